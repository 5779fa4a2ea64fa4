"""Build rows of labels from their parts, and group them by item."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.common.conversation import Conversation
from rlhf.common.numbers import is_number
from rlhf.config.labeling import LabelMode
from rlhf.data.columns import Row
from rlhf.data.conversation import as_conversation, checked_prompt, split_reply_from_prompt
from rlhf.data.formats import parse_number
from rlhf.data.labels import (
    MAX_RATING,
    in_canonical_order,
    is_rating,
    item_id_of,
    label_id_of,
    labels_not_undone,
)
from rlhf.data.messages import RowDropped


@dataclass(frozen=True)
class ForeignLabel:
    """A label from another tool. The replies are in the order of that tool."""

    mode: LabelMode
    annotator: str
    prompt: Any
    """The prompt: text or messages."""
    replies: Sequence[Any]
    """The replies: texts or messages; the written reply for mode demonstrations."""
    winner: int | None = None
    """For pairs, the index of the better reply; None for a tie."""
    margin: float | str | None = None
    """Strength of the preference, a number or its text."""
    rating: int | None = None
    ranks: Sequence[int] = ()
    """For rankings, the rank of each reply; 1 is the best."""
    gold: int | None = None
    """For a check item, the index of the reply that should be chosen."""
    skipped: bool = False
    note: str = ""
    seconds: float | None = None
    time: str = ""


def label_row(label: ForeignLabel) -> dict[str, Any]:
    """Return the row of a label.

    The id depends on the annotator and the item, so a label that is imported twice has the same id.

    Raises:
        RowDropped: The prompt, a reply, the rating or strength is invalid, or replies are equal.
    """
    prompt = checked_prompt(as_conversation(label.prompt, set()))
    replies = [split_reply_from_prompt(prompt, reply, set())[1] for reply in label.replies]
    if any(reply == other for i, reply in enumerate(replies) for other in replies[:i]):
        raise RowDropped("equal replies")
    if label.mode == "ratings" and not label.skipped and not is_rating(label.rating):
        raise RowDropped(f"rating is not a whole number from 0 to {MAX_RATING}")
    ordered = in_canonical_order(replies)
    shown = [] if label.mode == "demonstrations" else ordered
    item_id = item_id_of(prompt, shown)
    row: dict[str, Any] = {
        "label_id": label_id_of(label.annotator, item_id),
        "item_id": item_id,
        "mode": label.mode,
        "annotator": label.annotator,
        "time": label.time,
        "prompt": prompt,
    }
    seconds = label.seconds if is_number(label.seconds) else None
    optional = {"seconds": seconds, "note": str(label.note), "skipped": label.skipped}
    row |= {name: value for name, value in optional.items() if value}
    return row | _mode_columns(label, replies, ordered)


def _mode_columns(
    label: ForeignLabel, replies: Sequence[Conversation], ordered: Sequence[Conversation]
) -> dict[str, Any]:
    """Return the columns of a label that depend on its mode: the replies and the answer.

    Args:
        label: The label.
        replies: Its replies, in the order of the other tool.
        ordered: The same replies, in canonical order.

    Raises:
        RowDropped: The strength of a preference is not a number or is negative.
    """
    match label.mode:
        case "pairs":
            columns: dict[str, Any] = dict(zip(("response_a", "response_b"), ordered, strict=True))
            if label.gold is not None:
                columns["gold"] = "ab"[ordered.index(replies[label.gold])]
            if label.skipped:
                return columns
            if label.winner is None:
                return columns | {"winner": "tie", "margin": 0}
            columns["winner"] = "ab"[ordered.index(replies[label.winner])]
            if label.margin is None:
                return columns
            margin = parse_number(label.margin, "strength")
            if margin < 0:
                raise RowDropped("strength is negative")
            return columns | {"margin": margin}
        case "ratings":
            columns = {"completion": replies[0]}
            return columns if label.skipped else columns | {"rating": label.rating}
        case "rankings":
            columns = {"replies": list(ordered)}
            if label.skipped:
                return columns
            return columns | {"ranks": [label.ranks[replies.index(reply)] for reply in ordered]}
        case "demonstrations":
            return {} if label.skipped else {"completion": replies[0]}


def labels_by_item(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the labels that were not undone, grouped by item."""
    groups: dict[str, list[Row]] = {}
    for row in labels_not_undone(rows):
        groups.setdefault(row["item_id"], []).append(row)
    return list(groups.values())


def plain_messages(conversation: Conversation) -> list[dict[str, str]]:
    """Return the messages with role and content only, which other tools can show."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in conversation]


NOT_PLAIN = "with reasoning or tool calls (exported without them)"
"""Problem that is counted for a label for which `has_only_plain_messages` is False."""


def has_only_plain_messages(row: Row) -> bool:
    """Return whether the messages of a label have no more than role and content."""
    names = ("prompt", "response_a", "response_b", "completion")
    conversations = [*(row[name] for name in names if name in row), *row.get("replies", ())]
    return all(turn.keys() <= {"role", "content"} for turns in conversations for turn in turns)


def plain_messages_by_name(row: Row) -> dict[str, list[dict[str, str]]]:
    """Return the prompt and the replies of a label by name, as plain messages.

    The written reply of a demonstration is not included.
    """
    fields = {"prompt": plain_messages(row["prompt"])}
    match row["mode"]:
        case "pairs":
            names: Mapping[str, Conversation] = {
                name: row[name] for name in ("response_a", "response_b")
            }
        case "ratings":
            names = {"completion": row["completion"]}
        case "rankings":
            names = {f"reply_{i}": reply for i, reply in enumerate(row["replies"], start=1)}
        case _:
            names = {}
    return fields | {name: plain_messages(reply) for name, reply in names.items()}


def reply_names_best_first(row: Row) -> list[str] | None:
    """Return the names of the replies of a ranking, the best first; None if replies are tied."""
    ranks: Sequence[int] = row["ranks"]
    if len(set(ranks)) < len(ranks):
        return None
    order = sorted(range(len(ranks)), key=lambda index: ranks[index])
    return [f"reply_{index + 1}" for index in order]


def reply_names(fields: Mapping[str, Any]) -> list[str]:
    """Return the names reply_1, reply_2, ... that are among some fields, in this order."""
    names: list[str] = []
    while (name := f"reply_{len(names) + 1}") in fields:
        names.append(name)
    return names
