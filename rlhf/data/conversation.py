"""Turn one cell of a table (text, HH-RLHF dialogue or message list) into checked messages.

A row that cannot be used raises `RowDropped`; the loader counts the reasons.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Conversation = list[dict[str, str]]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
"""Spelling in the data -> role of the Hugging Face chat format."""

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_START = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)


class RowDropped(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


def is_dialogue(text: str) -> bool:
    r"""Whether `text` is an HH-RLHF dialogue: opens with Human: and has a \n\nAssistant: turn."""
    return _HH_START.match(text) is not None


def parse_dialogue(text: str) -> Conversation:
    r"""Messages of an HH-RLHF dialogue ("\n\nHuman: ...\n\nAssistant: ...").

    Only a marker after a blank line starts a turn: "Human:" inside a line is content. Every turn is
    stripped; a turn may be empty, as the open "\n\nAssistant:" at the end of a prompt is.
    """
    pieces = _HH_TURN.split("\n\n" + text.lstrip())
    return [
        {"role": ROLES[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def parse_messages(value: Sequence[Any]) -> Conversation:
    """Message dicts ({role, content}, or ShareGPT's {from, value}) with known roles, text only."""
    messages: Conversation = []
    for item in value:
        if not isinstance(item, Mapping):
            raise RowDropped("message is not a role and a content")
        role = item.get("role", item.get("from"))
        content = item.get("content", item.get("value"))
        if not isinstance(content, str):
            raise RowDropped("message content is not text")
        if not isinstance(role, str) or role not in ROLES:
            raise RowDropped(f"unknown role {role!r}")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def as_conversation(value: Any) -> Conversation:
    """A message list or an HH-RLHF dialogue as a conversation; plain text is one user turn."""
    if isinstance(value, str):
        if is_dialogue(value):
            return parse_dialogue(value)
        return [{"role": "user", "content": value}]
    if value is None:
        return []
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        raise RowDropped("neither text nor messages")
    return parse_messages(value)


def check_roles(messages: Conversation) -> None:
    """Refuse what chat templates refuse: a late system turn, a repeated role, no user first."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    previous = None
    for turn in turns:
        role = turn["role"]
        if role == "system":
            raise RowDropped("system message after the start")
        if previous is None and role != "user":
            raise RowDropped("first turn is not the user's")
        if role == previous and role != "tool":
            raise RowDropped("repeated role")
        previous = role


def checked_prompt(messages: Conversation) -> Conversation:
    """`messages` if they are a prompt: legal roles, no empty turn, the last one to be answered."""
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]  # the open "\n\nAssistant:" that ends a dialogue prompt
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in messages):
        raise RowDropped("empty prompt")
    if any(not turn["content"].strip() for turn in messages):
        raise RowDropped("empty turn in the prompt")
    check_roles(messages)
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowDropped("prompt ends with the assistant")
    return messages


def checked_reply(messages: Conversation) -> Conversation:
    """`messages` if they are a reply: assistant turns (tool results between), none empty."""
    if not messages or any(not turn["content"].strip() for turn in messages):
        raise RowDropped("empty reply")
    if any(turn["role"] not in ("assistant", "tool") for turn in messages):
        raise RowDropped("reply holds another speaker's turn")
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RowDropped("reply does not begin and end with the assistant")
    if any(a["role"] == b["role"] == "assistant" for a, b in pairwise(messages)):
        raise RowDropped("repeated role")
    return messages


def reply_to(prompt: Conversation, value: Any) -> Conversation:
    """The assistant's turns in `value`: text, messages, or a conversation that repeats `prompt`.

    Raises RowDropped("prompts differ") when a full conversation opens with another prompt.
    """
    if isinstance(value, str):
        return checked_reply([{"role": "assistant", "content": value}])
    messages = as_conversation(value)
    if not messages or messages[0]["role"] == "assistant":
        return checked_reply(messages)
    bare = without_system(prompt)
    messages = without_system(messages)
    if messages[: len(bare)] != bare:
        raise RowDropped("prompts differ")
    return checked_reply(messages[len(bare) :])


def without_system(messages: Conversation) -> Conversation:
    """`messages` less a leading system turn."""
    return messages[1:] if messages and messages[0]["role"] == "system" else messages


def after_system(
    messages: Sequence[dict[str, str]], more: Sequence[dict[str, str]]
) -> Conversation:
    """`messages` with `more` between a leading system turn and the rest."""
    rest = without_system(list(messages))
    return [*messages[: len(messages) - len(rest)], *more, *rest]


def labelled_conversation(row: Mapping[str, Any]) -> Conversation:
    """A canonical labelled row: its text as one message, or its reply with the prompt."""
    if "text" in row:
        return [{"role": "assistant", "content": row["text"]}]
    return [*row["prompt"], *row["completion"]]


def split_last_reply(messages: Conversation) -> tuple[Conversation, Conversation]:
    """(prompt, last assistant turn). User turns after the last reply are left out: unanswered."""
    replies = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not replies:
        raise RowDropped("no assistant turn")
    last = replies[-1]
    return checked_prompt(messages[:last]), checked_reply(messages[last : last + 1])


def split_first_reply(messages: Conversation) -> tuple[Conversation, Conversation]:
    """(prompt, everything from the first assistant turn to the last one).

    User turns after the last reply are left out: unanswered.
    """
    replies = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not replies:
        raise RowDropped("no assistant turn")
    exchange = messages[replies[0] : replies[-1] + 1]
    if any(not turn["content"].strip() for turn in exchange):
        raise RowDropped("empty reply")
    return checked_prompt(messages[: replies[0]]), exchange


def split_pair(chosen: Conversation, rejected: Conversation) -> tuple[Conversation, ...]:
    """(prompt, chosen reply, rejected reply) of two conversations that share their opening.

    The prompt is the longest common run of turns; what follows must be assistant turns in both.
    """
    if chosen == rejected:
        raise RowDropped("chosen equals rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    rests = chosen[shared:], rejected[shared:]
    if any(turn["role"] in ("user", "system") for rest in rests for turn in rest) or not all(rests):
        raise RowDropped("prompts differ")
    return checked_prompt(chosen[:shared]), checked_reply(rests[0]), checked_reply(rests[1])
