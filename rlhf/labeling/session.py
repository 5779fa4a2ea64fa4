"""The session of one annotator: choose the next item, and save each label exactly once."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.common.conversation import Message
from rlhf.common.files import is_utf8_encodable
from rlhf.config.labeling import LabelMode
from rlhf.data.labels import (
    RANGE_COLUMNS,
    label_id_of,
    labels_not_undone,
    new_label_row,
    new_undo_row,
    undone_ids,
)
from rlhf.errors import UserError
from rlhf.labeling.items import LabelItem
from rlhf.labeling.store import LabelFile

MAX_TEXT = 200_000
"""Maximum number of characters of a note or a written reply."""


class InvalidLabel(ValueError):
    """A submission is invalid; the message states the reason.

    For example, the answer is not possible in the mode, or the item is not in the queue.
    """


class ConflictingLabel(ValueError):
    """A submission is out of date.

    For example, the item has a different label already, the label was undone, or the page has
    other settings.
    """


@dataclass(frozen=True)
class LabelSettings:
    """The answers that an annotator can give."""

    mode: LabelMode = "pairs"
    strengths: int = 3
    """Number of strengths of a preference."""
    scale: int = 5
    """Highest rating. The lowest rating is 1."""
    seed: int = 0
    """Seed of the order in which the replies of an item are shown."""

    @property
    def id(self) -> str:
        """Hash of the settings. An answer is valid only with the settings of its page."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()[:16]

    @property
    def answer_range_columns(self) -> dict[str, int]:
        """Column that states the range of an answer -> its value; empty for modes without one."""
        column = RANGE_COLUMNS.get(self.mode)
        return {column: getattr(self, column)} if column else {}


@dataclass(frozen=True)
class LabelingTask:
    """An item as the annotator sees it."""

    label_id: str
    """Id of the label that the annotator will give. A repeated submission has the same id."""
    item: LabelItem
    reply_order: tuple[int, ...]
    """Index of the reply that is shown at each place."""


@dataclass(frozen=True)
class Progress:
    """The progress of one annotator, in numbers of items."""

    labeled: int
    skipped: int
    total: int
    last_label_id: str | None
    """Id of the annotator's last label in this queue, which `undo` accepts; None without labels."""


@dataclass(frozen=True)
class Submission:
    """An annotator's answer to a `LabelingTask`."""

    label_id: str
    item_id: str
    answer: Mapping[str, Any] | None
    """None to skip the item. Otherwise, depending on the mode:

    - pairs: choice (first, second or tie, in the order that is shown) and strength
    - ratings: rating
    - rankings: ranks of the replies in the order that is shown; 1 is the best
    - demonstrations: completion
    """
    note: str = ""
    seconds: float | None = None
    """Time that the annotator needed, in seconds; None if it is unknown."""
    settings_id: str | None = None
    """`LabelSettings.id` of the page that showed the item; None if it cannot be outdated."""


def turn_text(turn: Message) -> str:
    """Return the text of a message that an annotator sees, with its reasoning and tool calls."""
    parts = [turn.get("reasoning_content"), turn["content"]]
    calls = turn.get("tool_calls")
    parts.append(json.dumps(calls, ensure_ascii=False, indent=1) if calls else "")
    return "\n\n".join(part for part in parts if part)


class LabelingSession:
    """The items of one annotator, and the file to which the labels are appended.

    The methods can be called from several threads. All state is in the file: after a restart the
    session continues with the first item that the annotator has not labeled.

    Args:
        items: The items in the order of labeling, including check items.
        file: The file of labels.
        annotator: Id or pseudonym of the annotator.
        settings: The answers that the annotator can give.

    Raises:
        UserError: The file has labels of another mode, or of other strengths or another scale.
    """

    def __init__(
        self,
        items: Sequence[LabelItem],
        file: LabelFile,
        *,
        annotator: str,
        settings: LabelSettings,
    ) -> None:
        self.annotator, self.settings = annotator, settings
        self._file = file
        self._items = {item.item_id: item for item in items}
        self._lock = threading.Lock()
        file.check_mode(settings.mode, "output")
        self._check_same_answer_range()

    def _check_same_answer_range(self) -> None:
        """Check that the answers in the file have the range of this session.

        Files of earlier versions, imported labels and votes of a chat do not have the columns.

        Raises:
            UserError: A row has another range.
        """
        for column, value in self.settings.answer_range_columns.items():
            known = {row[column] for row in self._file.rows if row.get(column) is not None}
            other = known - {value}
            if other:
                raise UserError(
                    f"{column}: {self._file.path} has labels with {column}: {min(other)}, not "
                    f"{value}; the numbers would have different meanings; give another file"
                )

    @property
    def path(self) -> Path:
        """The file of labels."""
        return self._file.path

    def next_task(self) -> LabelingTask | None:
        """Return the task of the item that was undone last, else of the first item without a label.

        The result is None if all items have labels.
        """
        with self._lock:
            live = self._labels_not_undone_by_item()
            undone = [
                row["item_id"] for row in reversed(self._rows_of_annotator()) if row.get("undoes")
            ]
            for item_id in [*undone, *self._items]:
                if item_id in self._items and item_id not in live:
                    return self._task(self._items[item_id])
            return None

    def progress(self) -> Progress:
        """Return the numbers of labeled and skipped items."""
        with self._lock:
            live = list(self._labels_not_undone_by_item().values())
        skipped = sum(bool(row.get("skipped")) for row in live)
        last = live[-1]["label_id"] if live else None
        return Progress(len(live) - skipped, skipped, len(self._items), last)

    def submit(self, submission: Submission) -> str:
        """Save a label, and return its id.

        A repeated submission changes nothing and returns the same id.

        Raises:
            InvalidLabel: The answer is not possible in this mode, or the item is unknown.
            ConflictingLabel: The item has a label with a different answer, the label was undone,
                the id is not that of the item's next label, or the page has other settings.
            OSError: The label could not be written.
            UserError: The file was deleted or replaced.
        """
        if submission.item_id not in self._items:
            raise InvalidLabel("the item is not in this queue")
        if submission.settings_id not in (None, self.settings.id):
            raise ConflictingLabel("the server was restarted with other settings; reload the page")
        item = self._items[submission.item_id]
        with self._lock:
            answer = self._answer_columns(submission, item)
            saved = self._row_with_id(submission.label_id)
            if saved is not None:
                if submission.label_id in undone_ids(self._rows_of_annotator()):
                    raise ConflictingLabel("this label was undone; label the item again")
                submitted = answer | {"item_id": item.item_id}
                if any(saved.get(key) != value for key, value in submitted.items()):
                    raise ConflictingLabel("the item has a different label; undo it first")
                return submission.label_id
            if (
                item.item_id in self._labels_not_undone_by_item()
            ):  # imported labels can have other ids
                raise ConflictingLabel("the item has a different label; undo it first")
            if submission.label_id != self._task(item).label_id:
                raise ConflictingLabel("the label belongs to an older state of the item")
            row = self._base_row(submission.label_id, item.item_id) | {"prompt": item.prompt}
            if submission.seconds is not None:
                row["seconds"] = round(submission.seconds, 1)
            columns = self._reply_columns(item) | self.settings.answer_range_columns
            self._file.append(row | columns | answer)
        return submission.label_id

    def undo(self, label_id: str) -> str:
        """Undo a label of the annotator, and return its id; a repeated call changes nothing.

        Raises:
            InvalidLabel: The annotator has no label with this id in this queue.
            OSError: The row that undoes the label could not be written.
            UserError: The file was deleted or replaced.
        """
        with self._lock:
            row = self._row_with_id(label_id)
            if row is None or row["item_id"] not in self._items or row.get("undoes"):
                raise InvalidLabel("there is no such label to undo")
            if label_id not in undone_ids(self._rows_of_annotator()):
                self._file.append(new_undo_row(row))
        return label_id

    def _rows_of_annotator(self) -> list[dict[str, Any]]:
        return [row for row in self._file.rows if row["annotator"] == self.annotator]

    def _labels_not_undone_by_item(self) -> dict[str, Mapping[str, Any]]:
        """Return item id -> label, for the annotator's labels of this queue, in order of time."""
        rows = labels_not_undone(self._rows_of_annotator())
        return {row["item_id"]: row for row in rows if row["item_id"] in self._items}

    def _row_with_id(self, label_id: str) -> Mapping[str, Any] | None:
        return next((row for row in self._rows_of_annotator() if row["label_id"] == label_id), None)

    def _task(self, item: LabelItem) -> LabelingTask:
        """Return the task of an item. The id of its next label does not change at a restart.

        The order of the replies is random, and determined by the seed, the annotator and the item.
        """
        # The number of undone labels is not enough: an imported label that was undone can have the
        # id of a later attempt, because its earlier attempts are not in this file.
        undone = undone_ids(self._rows_of_annotator())
        label_id = next(
            label_id
            for attempt in itertools.count()
            if (label_id := label_id_of(self.annotator, item.item_id, attempt=attempt))
            not in undone
        )
        order = list(range(len(item.replies)))
        random.Random(f"{self.settings.seed}/{self.annotator}/{item.item_id}").shuffle(order)
        return LabelingTask(label_id, item, tuple(order))

    def _base_row(self, label_id: str, item_id: str) -> dict[str, Any]:
        return new_label_row(label_id, item_id, mode=self.settings.mode, annotator=self.annotator)

    def _reply_columns(self, item: LabelItem) -> dict[str, Any]:
        """Return the columns with the replies of an item, which do not depend on the answer."""
        order = self._task(item).reply_order
        match self.settings.mode:
            case "pairs":
                first, second = item.replies
                columns = {"response_a": first, "response_b": second, "shown_first": "ab"[order[0]]}
                return columns | ({"gold": "ab"[item.best or 0]} if item.is_check else {})
            case "ratings":
                return {"completion": item.replies[0]}
            case "rankings":
                return {"replies": list(item.replies), "shown_order": list(order)}
            case "demonstrations":
                return {}

    def _answer_columns(self, submission: Submission, item: LabelItem) -> dict[str, Any]:
        """Return the columns of an answer, with the note; a skipped item has the column skipped.

        Raises:
            InvalidLabel: The answer is malformed.
        """
        note = checked_text(submission.note, "note")
        columns: dict[str, Any] = {"note": note} if note else {}
        if submission.answer is None:
            return columns | {"skipped": True}
        read = _ANSWER_READERS[self.settings.mode]
        return columns | read(submission.answer, self._task(item), self.settings)


def _pair_columns(
    answer: Mapping[str, Any], task: LabelingTask, settings: LabelSettings
) -> dict[str, Any]:
    choice, strength = answer.get("choice"), answer.get("strength", 1)
    if choice == "tie":
        return {"winner": "tie", "margin": 0}
    if choice not in ("first", "second"):
        raise InvalidLabel("choice must be first, second or tie")
    if not _is_whole_number_in_range(strength, 1, settings.strengths):
        raise InvalidLabel(f"strength must be a whole number from 1 to {settings.strengths}")
    return {"winner": "ab"[task.reply_order[choice == "second"]], "margin": strength}


def _rating_columns(
    answer: Mapping[str, Any], task: LabelingTask, settings: LabelSettings
) -> dict[str, Any]:
    if not _is_whole_number_in_range(answer.get("rating"), 1, settings.scale):
        raise InvalidLabel(f"rating must be a whole number from 1 to {settings.scale}")
    return {"rating": answer["rating"]}


def _ranking_columns(
    answer: Mapping[str, Any], task: LabelingTask, settings: LabelSettings
) -> dict[str, Any]:
    shown, size = answer.get("ranks"), len(task.reply_order)
    if (
        not isinstance(shown, list)
        or len(shown) != size
        or not all(_is_whole_number_in_range(rank, 1, size) for rank in shown)
    ):
        raise InvalidLabel(f"ranks must be {size} whole numbers from 1 to {size}")
    by_index = dict(zip(task.reply_order, shown, strict=True))
    return {"ranks": [by_index[index] for index in range(size)]}


def _demonstration_columns(
    answer: Mapping[str, Any], task: LabelingTask, settings: LabelSettings
) -> dict[str, Any]:
    text = checked_text(answer.get("completion"), "completion")
    if not text:
        raise InvalidLabel("completion is empty")
    return {"completion": [{"role": "assistant", "content": text}]}


AnswerReader = Callable[[Mapping[str, Any], LabelingTask, LabelSettings], dict[str, Any]]
"""Function that returns the columns of an answer; it raises InvalidLabel."""

_ANSWER_READERS: Mapping[LabelMode, AnswerReader] = {
    "pairs": _pair_columns,
    "ratings": _rating_columns,
    "rankings": _ranking_columns,
    "demonstrations": _demonstration_columns,
}


def checked_text(value: Any, name: str) -> str:
    """Return a text without white space at its ends.

    Raises:
        InvalidLabel: The value is not a text, is too long, or has broken Unicode.
    """
    if not isinstance(value, str):
        raise InvalidLabel(f"{name} must be a text")
    if len(value) > MAX_TEXT:
        raise InvalidLabel(f"{name} must have at most {MAX_TEXT:,} characters")
    if not is_utf8_encodable(value):
        raise InvalidLabel(f"{name} has broken Unicode")
    return value.strip()


def _is_whole_number_in_range(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
