"""Define the rows of `rlhf label`: people's preferences, ratings, rankings and demonstrations.

A file of labels is append-only. A row is one label, or it undoes an earlier label, whose id is in
its column `undoes`. Every row has these columns:

- label_id: id of the row
- item_id: id of the prompt and the replies, see `item_id_of`
- mode: pairs, ratings, rankings or demonstrations
- annotator: id or pseudonym of the annotator
- time: time of the row (UTC, ISO 8601); empty if it is unknown

A label also has these columns:

- prompt, and the columns of the mode, see `MODE_COLUMNS`
- optional: note; skipped (true); seconds, the time that the annotator needed; gold, the known
  answer of a check item; strengths or scale, see `RANGE_COLUMNS`

The schemas make such a file training data: undone and skipped labels, ties, and check items are
dropped and counted.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhf.common.conversation import Conversation
from rlhf.config.data import Kind
from rlhf.config.labeling import LabelMode
from rlhf.data.columns import Row
from rlhf.data.formats import parse_number
from rlhf.data.messages import RowDropped
from rlhf.data.ranked_replies import CellsOrDropped, items_from_scored_replies
from rlhf.errors import UserError

LABEL_COLUMNS = frozenset({"label_id", "item_id", "mode", "annotator", "prompt"})
"""Columns by which a file of labels is recognized."""

RANGE_COLUMNS: Mapping[LabelMode, str] = {"pairs": "strengths", "ratings": "scale"}
"""Mode -> column with the largest possible strength or rating of a label."""

MAX_RATING = 100
"""Highest rating that an imported label can have."""


def is_rating(value: Any) -> bool:
    """Return whether a value is a whole number from 0 to `MAX_RATING`."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and 0 <= value <= MAX_RATING


def check_labels_have_one_scale(
    rows: Iterable[Row], option: str, columns: Iterable[str] = RANGE_COLUMNS.values()
) -> None:
    """Check that the strengths and the ratings of labels have one range.

    Labels without the columns, such as imported ones, are not compared.

    Args:
        rows: Labels, or canonical rows that were read from labels.
        option: Option that names the files of the labels, for the error.
        columns: Columns of `RANGE_COLUMNS` to compare.

    Raises:
        UserError: Two labels have different ranges.
    """
    known: dict[str, set[int]] = {column: set() for column in columns}
    for row in rows:
        for column, ranges in known.items():
            if row.get(column) is not None:
                ranges.add(row[column])
    for column, ranges in known.items():
        if len(ranges) > 1:
            raise UserError(
                f"{option}: some labels have {column}: {min(ranges)} and others {column}: "
                f"{max(ranges)}; the numbers would have different meanings"
            )


def item_id_of(prompt: Conversation, replies: Sequence[Conversation] = ()) -> str:
    """Return an id of a prompt and its replies, which does not depend on the replies' order."""
    parts = [_json_of(prompt), *sorted(map(_json_of, replies))]
    return hashlib.sha256("\0".join(parts).encode(errors="backslashreplace")).hexdigest()[:16]


def label_id_of(annotator: str, item_id: str, *, attempt: int = 0) -> str:
    """Return the id of an annotator's label of an item.

    Args:
        annotator: Id or pseudonym of the annotator.
        item_id: Id of the item.
        attempt: Number that distinguishes the annotator's labels of this item; 0 for the first.
    """
    key = f"{annotator}\0{item_id}\0{attempt}"
    return hashlib.sha256(key.encode(errors="backslashreplace")).hexdigest()[:16]


def in_canonical_order(replies: Iterable[Conversation]) -> list[Conversation]:
    """Return replies in an order that depends on their content only.

    Labels of the same replies are therefore comparable, whatever the order of the source, and the
    order does not reveal the source.
    """
    return sorted(replies, key=_json_of)


def new_label_row(
    label_id: str, item_id: str, *, mode: LabelMode, annotator: str
) -> dict[str, Any]:
    """Return a new row with the columns that every row has, and the current time."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "label_id": label_id,
        "item_id": item_id,
        "mode": mode,
        "annotator": annotator,
        "time": now,
    }


def new_undo_row(label: Row) -> dict[str, Any]:
    """Return a new row that undoes a label."""
    label_id = label["label_id"]
    row = new_label_row(
        f"{label_id}-undo", label["item_id"], mode=label["mode"], annotator=label["annotator"]
    )
    return row | {"undoes": label_id}


def undone_ids(rows: Iterable[Row]) -> set[str]:
    """Return the ids of the labels that were undone."""
    return {row["undoes"] for row in rows if isinstance(row.get("undoes"), str)}


def labels_not_undone(rows: Iterable[Row]) -> list[Row]:
    """Return the labels that were not undone, including skipped items."""
    rows = list(rows)
    undone = undone_ids(rows)
    return [row for row in rows if not row.get("undoes") and row["label_id"] not in undone]


def labels_with_undone_marks(rows: Sequence[Row]) -> list[Row]:
    """Remove the rows that undo a label, and add the column `undone` to the labels they undo."""
    rows = list(rows)
    undone = undone_ids(rows)
    return [
        {**row, "undone": True} if str(row.get("label_id")) in undone else row
        for row in rows
        if not row.get("undoes")
    ]


def read_pair_label(row: Row, kind: Kind) -> Iterator[CellsOrDropped]:
    """Yield the pair of a label of mode pairs; the margin is the strength of the preference.

    For the kind "prompt", only the prompt is yielded.

    Raises:
        RowDropped: The label is a tie or cannot be used for training.
    """
    _check_usable(row, "pairs")
    if kind == "prompt":
        yield {"prompt": row["prompt"]}
    elif row["winner"] == "tie":
        raise RowDropped("tie")
    elif row["winner"] not in ("a", "b"):
        raise RowDropped("winner is not a, b or tie")
    else:
        first = row["winner"] == "a"
        yield {
            "prompt": row["prompt"],
            "chosen": row["response_a" if first else "response_b"],
            "rejected": row["response_b" if first else "response_a"],
            "margin": row.get("margin"),
        } | _answer_range(row, "pairs")


def read_rating_label(row: Row, kind: Kind) -> Iterator[CellsOrDropped]:
    """Yield the reply of a label of mode ratings, without the rating, which `keep` can add."""
    _check_usable(row, "ratings")
    cells = {"prompt": row["prompt"], "completion": row["completion"]}
    yield cells | _answer_range(row, "ratings")


def read_ranking_label(row: Row, kind: Kind) -> Iterator[CellsOrDropped]:
    """Yield the ranking of a label of mode rankings, or its pairs."""
    _check_usable(row, "rankings")
    yield from items_from_scored_replies(
        row["prompt"], row["replies"], row["ranks"], kind, values_are_ranks=True
    )


def read_demonstration_label(row: Row, kind: Kind) -> Iterator[CellsOrDropped]:
    """Yield the reply that an annotator wrote."""
    _check_usable(row, "demonstrations")
    cells = {"prompt": row["prompt"]}
    yield cells if kind == "prompt" else cells | {"completion": row["completion"]}


LABEL_READERS: Mapping[
    LabelMode, tuple[tuple[Kind, ...], Callable[[Row, Kind], Iterator[CellsOrDropped]]]
] = {
    "pairs": (("preference", "prompt"), read_pair_label),
    "ratings": (("rated", "sft"), read_rating_label),
    "rankings": (("ranking", "preference"), read_ranking_label),
    "demonstrations": (("sft", "prompt"), read_demonstration_label),
}
"""Mode -> kinds of canonical rows, and the function that reads a label."""

MODE_COLUMNS: Mapping[LabelMode, tuple[str, ...]] = {
    "pairs": ("response_a", "response_b", "winner", "margin"),
    "ratings": ("completion", "rating"),
    "rankings": ("replies", "ranks"),
    "demonstrations": ("completion",),
}
"""Mode -> columns of its labels.

- winner: a, b or tie; margin: strength of the preference, 0 for a tie
- rating: a whole number from 0 to `MAX_RATING`; a higher rating is better
- ranks: rank of each of `replies`; 1 is the best
"""


def _check_usable(row: Row, mode: LabelMode) -> None:
    """Raise RowDropped if a label has another mode, or cannot be used for training."""
    if row["mode"] != mode:
        raise RowDropped(f"label of mode {row['mode']}")
    for column, reason in (
        ("undone", "undone label"),
        ("skipped", "skipped item"),
        ("gold", "check item"),
    ):
        if row.get(column):
            raise RowDropped(reason)


def _answer_range(row: Row, mode: LabelMode) -> dict[str, Any]:
    """Return the cell with the largest possible answer of a label; {} if the label has none."""
    column = RANGE_COLUMNS[mode]
    value = row.get(column)
    # The library pandas stores missing values as nan.
    return {} if value is None or value != value else {column: parse_number(value, column)}


def _json_of(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
