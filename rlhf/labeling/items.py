"""Read the items to label: a prompt, and the replies to compare, to rate or to rank."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.common.conversation import Conversation
from rlhf.config.data import DataSpec, Kind
from rlhf.config.labeling import LabelMode
from rlhf.data.columns import ALIASES
from rlhf.data.files import read_rows
from rlhf.data.labels import in_canonical_order, item_id_of
from rlhf.data.reader import TableReader, columns_of
from rlhf.errors import UserError

log = logging.getLogger(__name__)

_KINDS_BY_MODE: Mapping[LabelMode, tuple[Kind, ...]] = {
    "pairs": ("preference", "ranking", "sft"),
    "ratings": ("sft", "ranking", "preference"),
    "rankings": ("ranking", "sft", "preference"),
    "demonstrations": ("prompt",),
}
"""Mode -> kinds of rows that can be converted to items, in the order in which they are tried."""

_NEEDED_COLUMNS_TEXT: Mapping[LabelMode, str] = {
    "pairs": "prompt with chosen and rejected, response_a and response_b, replies, or completion "
    "in several rows of a prompt",
    "ratings": "prompt with completion, replies, or chosen and rejected",
    "rankings": "prompt with replies, chosen and rejected, or completion in several rows of a "
    "prompt",
    "demonstrations": "prompt",
}


@dataclass(frozen=True)
class LabelItem:
    """A prompt with the replies that an annotator labels."""

    item_id: str
    prompt: Conversation
    replies: tuple[Conversation, ...]
    """Two for mode pairs, one for ratings, two or more for rankings, none for demonstrations; in
    the order of `in_canonical_order`."""
    best: int | None = None
    """Index of the better reply of a pair according to the data; None if it is unknown."""
    is_check: bool = False
    """Whether the item checks the annotator, who should choose `best`."""


def read_items(specs: Sequence[DataSpec], mode: LabelMode) -> list[LabelItem]:
    """Return the distinct items of several sources, in the order of their first rows.

    Raises:
        UserError: A source cannot be read, does not have the columns of the mode, or has no row
            that can be labeled.
    """
    items = (item for spec in specs for item in _items_of_source(spec, mode))
    return list({item.item_id: item for item in items}.values())


def read_check_items(specs: Sequence[DataSpec]) -> list[LabelItem]:
    """Return distinct pairs whose better reply is known, to check the annotators.

    Raises:
        UserError: A source cannot be read, does not state which reply is better, or states it
            differently in two rows.
    """
    pairs = [item for spec in specs for item in _items_of_source(spec, "pairs")]
    if any(item.best is None for item in pairs):
        raise UserError(
            "checks: the rows must state the better reply: prompt, chosen and rejected, or "
            "response_a, response_b and winner"
        )
    items = {item.item_id: item for item in pairs}
    if any(item.best != items[item.item_id].best for item in pairs):
        raise UserError("checks: two rows state different better replies of the same pair")
    return [replace(item, is_check=True) for item in items.values()]


def _items_of_source(spec: DataSpec, mode: LabelMode) -> Iterator[LabelItem]:
    reader = _read_source(spec, mode)
    rows = reader.rows
    if reader.kind == "sft" and mode != "ratings":
        rows = _rankings_from_single_replies(rows)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in reader.num_dropped.items())
    log.info("%s: %d rows%s", spec.path, len(rows), f"; dropped {dropped}" if dropped else "")
    for row in rows:
        yield from _items_of_row(row, mode)


def _read_source(spec: DataSpec, mode: LabelMode) -> TableReader:
    """Read a source as the first kind of rows for which it has the columns.

    Raises:
        UserError: It has the columns of no kind, or no row can be labeled.
    """
    table = _with_replies_of_unlabeled_pairs(read_rows(spec))
    for kind in _KINDS_BY_MODE[mode]:
        try:
            reader = TableReader(table, kind, spec)
        except UserError:
            continue
        reader.read(range(len(reader.table)))
        if reader.rows and "text" not in reader.rows[0]:
            return reader
        reasons = ", ".join(reader.num_dropped) or "plain text without a prompt"
        raise UserError(f"{spec.path}: no row can be labeled ({reasons})")
    raise UserError(
        f"{spec.path}: mode {mode} needs the columns {_NEEDED_COLUMNS_TEXT[mode]}; columns found: "
        f"{', '.join(sorted(columns_of(table)))}"
    )


def _with_replies_of_unlabeled_pairs(table: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
    """Return the table; pairs without a label have the additional column `replies`."""
    present = columns_of(table)
    labeled = {"winner", "score_a", "score_b", *ALIASES["replies"]} & present
    if labeled or not {"response_a", "response_b"} <= present:
        return table
    return [{**row, "replies": [row.get("response_a"), row.get("response_b")]} for row in table]


def _rankings_from_single_replies(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row with the distinct replies of each prompt that has at least two.

    Raises:
        UserError: No prompt has two distinct replies.
    """
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = item_id_of(row["prompt"])  # replies to different system messages are not comparable
        group = groups.setdefault(key, {"prompt": row["prompt"], "replies": []})
        if row["completion"] not in group["replies"]:
            group["replies"].append(row["completion"])
    rankings = [group for group in groups.values() if len(group["replies"]) > 1]
    if not rankings:
        raise UserError(
            "data: no prompt has two different completions to compare; sample several with "
            "rlhf generate --samples 2"
        )
    return rankings


def _items_of_row(row: Mapping[str, Any], mode: LabelMode) -> Iterator[LabelItem]:
    """Yield the items of a canonical row: each pair of replies, each reply, or the whole row."""
    prompt = row["prompt"]
    if mode == "demonstrations":
        yield LabelItem(item_id_of(prompt), prompt, ())
        return
    chosen = row.get("chosen")
    replies = row.get("replies") or [
        row[side] for side in ("chosen", "rejected", "completion") if side in row
    ]
    groups = {
        "pairs": itertools.combinations(replies, 2),
        "ratings": ([reply] for reply in replies),
        "rankings": [replies],
    }[mode]
    for group in groups:
        ordered = in_canonical_order(group)
        best = ordered.index(chosen) if mode == "pairs" and chosen is not None else None
        yield LabelItem(item_id_of(prompt, ordered), prompt, tuple(ordered), best)
