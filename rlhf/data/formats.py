"""Find out which columns hold what, and turn each row into the canonical shape of its kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from rlhf.data.conversation import (
    Conversation,
    RowDropped,
    as_conversation,
    checked_prompt,
    is_dialogue,
    parse_dialogue,
    reply_to,
    split_first_reply,
    split_last_reply,
    split_pair,
)
from rlhf.data.spec import Kind
from rlhf.errors import UserError, nearest

Columns = Mapping[str, str]
"""Our field -> the column that holds it."""

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "problem", "input"),
    "input": ("input", "context"),
    "completion": ("completion", "response", "answer", "output"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "margin": ("margin",),
    "messages": ("messages", "conversations", "conversation"),
    "label": ("label", "labels", "score"),
    "text": ("text", "sentence", "review", "content"),
    "replies": ("replies", "responses", "completions"),
    "steps": ("steps", "completions"),
    "labels": ("labels",),
}
"""Our field -> column names that are recognised without a mapping, the likeliest first."""

LAYOUTS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "sft": (("prompt", "completion"), ("messages",)),
    "preference": (("chosen", "rejected"),),
    "label": (("prompt", "completion", "label"), ("messages", "label")),
    "prompt": (("prompt",), ("messages",), ("chosen",), ("text",)),
    "text": (("text",),),
    "classification": (("text", "label"), ("prompt", "completion", "label"), ("messages", "label")),
    "rated": (("text",), ("prompt", "completion"), ("messages",)),
    "ranking": (("prompt", "replies"),),
    "steps": (("prompt", "steps", "labels"),),
}
"""Fields that make a row of each kind; the first layout whose columns are all there is taken."""

EXTRAS: dict[Kind, tuple[str, ...]] = {"preference": ("prompt", "margin")}
"""Fields that are used when present."""


def find_columns(
    kind: Kind, present: Collection[str], *, mapping: Columns | None, source: str
) -> dict[str, str]:
    """Our field -> column for a table that has the columns `present`.

    A mapped field beats recognition by name, and a layout that uses mapped fields beats one that
    does not. An Alpaca table (instruction, input, output) also yields `input`, the text that its
    instruction is about.

    Raises UserError naming the columns found and how to map them.
    """
    mapping = dict(mapping or {})
    _check_mapping(kind, present, mapping=mapping, source=source)
    layouts = sorted(LAYOUTS[kind], key=lambda fields: -len(mapping.keys() & set(fields)))
    for fields in layouts:
        found = {field: _column(field, present, mapping) for field in fields}
        if all(found.values()):
            break
    else:
        needed = " or ".join(" + ".join(fields) for fields in LAYOUTS[kind])
        example = ", ".join(f"{field}: ..." for field in LAYOUTS[kind][0])
        raise UserError(
            f"{source}: {kind} data needs {needed}; columns found: {', '.join(sorted(present))}; "
            f"map them with data.columns: {{{example}}}"
        )
    for field in EXTRAS.get(kind, ()):
        found[field] = _column(field, present, mapping)
    if "input" in mapping or found.get("prompt") == "instruction":
        found["input"] = _column("input", present, mapping)
    return {field: column for field, column in found.items() if column}


def _column(field: str, present: Collection[str], mapping: Columns) -> str | None:
    if field in mapping:
        return mapping[field]
    taken = set(mapping.values())
    return next((c for c in ALIASES[field] if c in present and c not in taken), None)


def _check_mapping(kind: Kind, present: Collection[str], *, mapping: Columns, source: str) -> None:
    useful = {field for fields in LAYOUTS[kind] for field in fields} | set(EXTRAS.get(kind, ()))
    if "prompt" in useful:
        useful.add("input")
    for field, column in mapping.items():
        if field not in useful:
            raise UserError(
                f"{source}: data.columns.{field} has no use in {kind} data "
                f"(useful: {', '.join(sorted(useful))})"
            )
        if column not in present:
            raise UserError(
                f"{source}: data.columns.{field} names column {column!r}, which is not there; "
                f"columns found: {', '.join(sorted(present))}{nearest(column, present)}"
            )


def convert(
    row: Mapping[str, Any], kind: Kind, *, columns: Columns, system: str | None
) -> dict[str, Any]:
    """The canonical row of `kind`. Raises RowDropped with the reason when it cannot be used."""
    cells = {field: row.get(column) for field, column in columns.items()}
    result = CONVERTERS[kind](cells)
    _check_unicode(result)
    if system is not None and "prompt" in result and result["prompt"][0]["role"] != "system":
        result["prompt"] = [{"role": "system", "content": system}, *result["prompt"]]
    return result


def _check_unicode(result: Mapping[str, Any]) -> None:
    """Lone surrogates pass JSON but no tokenizer: better dropped here than dying in training."""
    for value in result.values():
        try:
            "".join(_texts(value)).encode()
        except UnicodeEncodeError:
            raise RowDropped("broken Unicode") from None


def _texts(value: Any) -> Iterator[str]:
    """Every text in a cell: a text, messages, or lists of these."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(value.get("content"))
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _prompt(cells: Mapping[str, Any]) -> Conversation:
    value, extra = cells["prompt"], cells.get("input")
    if isinstance(value, str) and isinstance(extra, str) and extra.strip():
        value = f"{value}\n\n{extra}"
    return checked_prompt(as_conversation(value))


def _reply(cells: Mapping[str, Any], field: str, prompt: Conversation) -> Conversation:
    value, cell = cells[field], cells["prompt"]
    if isinstance(value, str) and isinstance(cell, str) and is_dialogue(cell):
        value = value.removeprefix(cell)
        if is_dialogue(value):
            return reply_to(prompt, parse_dialogue(value))
        if "\n\nHuman:" in value:
            raise RowDropped("reply holds another speaker's turn")
        value = value.strip()
    return reply_to(prompt, value)


def _prompt_and_reply(cells: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
    if "messages" in cells:
        return split_last_reply(as_conversation(cells["messages"]))
    prompt = _prompt(cells)
    return prompt, _reply(cells, "completion", prompt)


def _sft(cells: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" in cells:
        prompt, completion = split_first_reply(as_conversation(cells["messages"]))
    else:
        prompt, completion = _prompt_and_reply(cells)
    return {"prompt": prompt, "completion": completion}


def _label(cells: Mapping[str, Any]) -> dict[str, Any]:
    prompt, completion = _prompt_and_reply(cells)
    return {"prompt": prompt, "completion": completion, "label": _boolean(cells["label"])}


def _pair(cells: Mapping[str, Any]) -> tuple[Conversation, ...]:
    if "prompt" in cells:
        prompt = _prompt(cells)
        chosen, rejected = (_reply(cells, field, prompt) for field in ("chosen", "rejected"))
    else:
        whole = [cells[field] for field in ("chosen", "rejected")]
        if any(isinstance(value, str) and not is_dialogue(value) for value in whole):
            raise RowDropped("plain text without a prompt column")
        prompt, chosen, rejected = split_pair(*map(as_conversation, whole))
    if [t["content"].strip() for t in chosen] == [t["content"].strip() for t in rejected]:
        raise RowDropped("chosen equals rejected")
    return prompt, chosen, rejected


def _preference(cells: Mapping[str, Any]) -> dict[str, Any]:
    prompt, chosen, rejected = _pair(cells)
    row: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if "margin" in cells:
        row["margin"] = float(_number(cells["margin"], "margin"))
    return row


def _prompt_only(cells: Mapping[str, Any]) -> dict[str, Any]:
    if "prompt" in cells:
        return {"prompt": _prompt(cells)}
    if "chosen" in cells:
        return {"prompt": split_last_reply(as_conversation(cells["chosen"]))[0]}
    messages = as_conversation(cells.get("messages", cells.get("text")))
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return {"prompt": checked_prompt(messages)}


def _text(cells: Mapping[str, Any]) -> dict[str, Any]:
    text = cells["text"]
    if text is not None and not isinstance(text, str):
        raise RowDropped("text is not a string")
    if not text or not text.strip():
        raise RowDropped("empty text")
    return {"text": text}


def _rated(cells: Mapping[str, Any]) -> dict[str, Any]:
    if "text" in cells:
        return _text(cells)
    prompt, completion = _prompt_and_reply(cells)
    return {"prompt": prompt, "completion": completion}


def _classification(cells: Mapping[str, Any]) -> dict[str, Any]:
    return _rated(cells) | {"label": _number(cells["label"], "label")}


def _ranking(cells: Mapping[str, Any]) -> dict[str, Any]:
    prompt, replies = _prompt(cells), cells["replies"]
    if not isinstance(replies, list) or len(replies) < 2:
        raise RowDropped("fewer than two replies")
    return {"prompt": prompt, "replies": [reply_to(prompt, reply) for reply in replies]}


def _steps(cells: Mapping[str, Any]) -> dict[str, Any]:
    prompt, steps, labels = _prompt(cells), cells["steps"], cells["labels"]
    if not isinstance(steps, list) or not all(isinstance(s, str) and s.strip() for s in steps):
        raise RowDropped("steps are not a list of texts")
    if not isinstance(labels, list) or len(labels) != len(steps) or not steps:
        raise RowDropped("not one label for each step")
    if not all(label is None or label in (0, 1) for label in labels):
        raise RowDropped("a step's label is not true, false or missing")
    return {"prompt": prompt, "steps": steps, "labels": labels}


def _number(value: Any, field: str) -> int | float:
    """An int stays an int; a CSV cell is parsed; anything else, and nan, drops the row."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RowDropped(f"{field} is not a number") from None
        value = int(value) if value.is_integer() else value
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RowDropped(f"{field} is not a number")
    return int(value) if isinstance(value, bool) else value


def _boolean(value: Any) -> bool:
    spelled = {"true": True, "false": False, "1": True, "0": False}
    if isinstance(value, str) and value.strip().lower() in spelled:
        return spelled[value.strip().lower()]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise RowDropped("label is not true or false")


CONVERTERS: dict[Kind, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "sft": _sft,
    "preference": _preference,
    "label": _label,
    "prompt": _prompt_only,
    "text": _text,
    "classification": _classification,
    "rated": _rated,
    "ranking": _ranking,
    "steps": _steps,
}
