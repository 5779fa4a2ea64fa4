"""Convert the messages and tool descriptions of a dataset to canonical messages and tools.

A canonical message has the keys `role` (system, user, assistant, tool) and `content` (text).
Optional keys are `reasoning_content`, `tool_calls`, `name`, `tool_call_id`, `weight` (0 excludes a
reply from the loss), and `answer`, `tests` and the reward columns of a source, which only rewards
read. A description of every other key with a value is added to `notes`. A row that cannot be used
raises `RowDropped`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.common.conversation import (
    READ_KEYS,
    REASONING_KEYS,
    WEIGHT_KEYS,
    Conversation,
    Message,
)
from rlhf.data.answers import reference_answer

Notes = set[str]
"""Descriptions of ignored parts of a row; the loader counts the rows with each description."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""Role name in a dataset, in lower case -> role of the Hugging Face chat format."""

ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
"""Names under which a tool call can have its arguments; a call with several is dropped."""
TEXT_PART_TYPES = frozenset({"text", "input_text", "output_text"})
"""Types of the parts of a content that have text under the key `text`."""
_CALL_KEYS = {"id", "type", "index", "function", "name", *ARGUMENT_KEYS}


DIFFERING_REASONING = "reasoning that differs from other reasoning of its message"
_THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


class RowDropped(Exception):
    """Raised for a row that cannot be used; the loader counts the rows by message."""


def decode_if_json(value: Any) -> Any:
    """Decode a string with a JSON list or object, as in CSV cells; other values are unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def decode_if_json_messages(value: Any) -> Any:
    """Decode a string with the JSON of a message or of a list of messages.

    Other values, including other JSON, are returned unchanged.
    """
    decoded = decode_if_json(value)
    items = decoded if isinstance(decoded, list) else [decoded]
    return decoded if items and all(map(is_message, items)) else value


def messages_of_alternating_texts(value: Any) -> Any:
    """Convert a list of texts, as in LIMA, to messages: user and assistant take turns.

    Other values are returned unchanged.
    """
    texts = decode_if_json(value)
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        return value
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def is_message(value: Any) -> bool:
    """Return whether a value is an object {role, content} or {from, value}."""
    return isinstance(value, Mapping) and (
        {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()
    )


def parse_messages(value: Sequence[Any], notes: Notes) -> Conversation:
    """Convert a list of messages or of {input, output} pairs to canonical messages.

    Raises:
        RowDropped: A message cannot be converted.
    """
    messages: Conversation = []
    for item in value:
        if not isinstance(item, Mapping):
            raise RowDropped("message is not an object with a role and a content")
        if {"input", "output"} <= item.keys():
            messages += _parse_input_output_pair(item, notes)
        else:
            messages.append(parse_message(item, notes))
    return messages


def _parse_input_output_pair(item: Mapping[str, Any], notes: Notes) -> Conversation:
    """Convert {input, output} to two messages, after a system message if `item` has one."""
    roles = {"system": "system", "input": "user", "output": "assistant"}
    notes.update(
        f"message key {key!r}" for key in item if key not in roles and is_filled(item[key])
    )
    return [
        parse_message({"role": role, "content": item[key]}, notes)
        for key, role in roles.items()
        if key != "system" or is_filled(item.get(key))
    ]


def parse_message(item: Mapping[str, Any], notes: Notes) -> Message:
    """Convert a message, {role, content} or {from, value}, to a canonical message.

    Descriptions of ignored keys are added to `notes`.

    Raises:
        RowDropped: The role is unknown, or a value is not valid.
    """
    raw_role = item.get("role", item.get("from"))
    role = ROLES.get(raw_role.lower()) if isinstance(raw_role, str) else None
    if role is None:
        raise RowDropped(f"unknown role {raw_role!r}")
    content = item.get("content", item.get("value"))
    text, reasoning, calls = _text_reasoning_and_calls(content, notes)
    message: Message = {"role": role, "content": text}
    if isinstance(raw_role, str) and raw_role.lower() in ("function_call", "tool_call"):
        message |= {"content": "", "tool_calls": _parse_tool_calls(decode_if_json(content), notes)}
    _add_reply_keys(item, message, reasoning, calls, notes)
    for key in ("name", "tool_call_id"):
        if item.get(key) is not None:
            message[key] = str(item[key])
    if message["content"] is None:
        if not message.get("tool_calls"):
            raise RowDropped("message content is not text")
        message["content"] = ""
    if item.get("answer") is not None:
        message["answer"] = _parse_answer(item["answer"])
    if item.get("tests") is not None:
        message["tests"] = item["tests"]
    unread = (key for key, cell in item.items() if key not in READ_KEYS and is_filled(cell))
    notes.update(f"message key {key!r}" for key in unread)
    return message


def _add_reply_keys(
    item: Mapping[str, Any], message: Message, reasoning: str, calls: list[Any], notes: Notes
) -> None:
    """Add the reasoning, tool calls and weight of `item` to an assistant message, in place.

    `reasoning` and `calls` are those of the content parts. If `message` is not an assistant
    message, the values are not added but noted.

    Raises:
        RowDropped: The reasoning is not text, the tool calls are malformed, or a weight is neither
            0 nor 1.
    """
    values = [item[key] for key in REASONING_KEYS if is_filled(item.get(key))]
    if not all(isinstance(value, str) for value in values):
        raise RowDropped("reasoning is not text")
    thoughts = [thought for thought in (reasoning, *values) if thought.strip()]
    if len({thought.strip() for thought in thoughts}) > 1:
        notes.add(DIFFERING_REASONING)
    reasoning = thoughts[0] if thoughts else ""
    calls = calls + (
        _parse_tool_calls(item["tool_calls"], notes) if is_filled(item.get("tool_calls")) else []
    )
    if is_filled(item.get("function_call")):
        calls += _parse_tool_calls([item["function_call"]], notes)
    weights = [item[key] for key in WEIGHT_KEYS if item.get(key) is not None]
    if message["role"] != "assistant":
        ignored = {"reasoning": reasoning, "tool calls": calls, "weight": any(weights)}
        notes.update(f"{what} of a {message['role']} message" for what in ignored if ignored[what])
        return
    if reasoning:
        add_reasoning(message, reasoning, notes)
    if calls:
        message["tool_calls"] = [*message.get("tool_calls", []), *calls]
    if weights:
        if any(weight not in (0, 1) for weight in weights):
            raise RowDropped("a message's weight is neither 0 nor 1")
        if any(weight == 0 for weight in weights):
            message["weight"] = 0  # 1 is the default


def add_reasoning(message: Message, reasoning: str, notes: Notes) -> None:
    """Add reasoning to an assistant message, in place.

    If the content begins with a ``<think>`` block, the block is removed, because a template would
    write a second block. Reasoning in the block that differs from ``reasoning`` is noted.
    """
    message["reasoning_content"] = reasoning
    content = message["content"]
    block = _THINK_BLOCK.match(content) if isinstance(content, str) else None
    if block:
        message["content"] = content[block.end() :]
        if block[1].strip() not in ("", reasoning.strip()):
            notes.add(DIFFERING_REASONING)


def _text_reasoning_and_calls(value: Any, notes: Notes) -> tuple[str | None, str, list[Any]]:
    """Split message content (text, None, or a list of parts) into (text, reasoning, tool calls).

    Raises:
        RowDropped: The content or one of its parts has another type.
    """
    if value is None or isinstance(value, str):
        return value, "", []
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        raise RowDropped("message content is not text")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind in TEXT_PART_TYPES and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "thinking" and isinstance(part.get("thinking"), str):
            thoughts.append(part["thinking"])
        elif kind == "tool_use":
            calls += _parse_tool_calls([part], notes)
            continue
        else:
            raise RowDropped(f"message contains a part that is not text ({kind})")
        read = {"type", "text", "thinking"}
        notes.update(f"content part key {k!r}" for k, v in part.items() if k not in read and v)
    return ("".join(texts) if texts or not calls else None), "".join(thoughts), calls


def _parse_tool_calls(value: Any, notes: Notes) -> list[Message]:
    """Convert tool calls to [{type, function: {name, arguments}}] and decode JSON arguments.

    The id of a call is kept if it is a text. Descriptions of ignored keys are added to `notes`.

    Raises:
        RowDropped: The value is not a list of tool calls, or a call has no function name, or has
            arguments under several names.
    """
    value = decode_if_json(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowDropped("tool calls are not a list of calls")
    calls = []
    for item in value:
        inner = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RowDropped("a tool call has no function name")
        named = [key for key in ARGUMENT_KEYS if is_filled(inner.get(key))]
        if len(named) > 1:
            raise RowDropped("a tool call has arguments under several names")
        arguments = decode_if_json(inner[named[0]]) if named else {}
        function = {"name": inner["name"], "arguments": arguments}
        unread = {**item, **inner}.items()
        notes.update(
            f"tool call key {k!r}" for k, v in unread if k not in _CALL_KEYS and is_filled(v)
        )
        known = {"id": item["id"]} if isinstance(item.get("id"), str) else {}
        calls.append({"type": "function", "function": function} | known)
    return calls


def parse_tools(value: Any) -> list[Message]:
    """Convert tool descriptions to [{type, function}]; the result is [] if there are none.

    Descriptions that have the key `function` or no key `name` are not changed.

    Raises:
        RowDropped: The value is neither a list of objects nor the JSON of a list of objects.
    """
    value = decode_if_json(value)
    if not is_filled(value):
        return []
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowDropped("tools are not a list of descriptions")
    return [
        dict(tool)
        if "function" in tool or "name" not in tool
        else {"type": "function", "function": dict(tool)}
        for tool in value
    ]


def _parse_answer(value: Any) -> str | list[str]:
    answer = reference_answer(value)
    if answer is None:
        raise RowDropped("a message's answer is not a text, a number or a list of these")
    return answer


def is_filled(value: Any) -> bool:
    """Return whether a cell is not None and not an empty string, list or object."""
    return value is not None and value != "" and value != [] and value != {}
