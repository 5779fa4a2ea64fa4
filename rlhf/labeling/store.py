"""Append labels to a file so that no saved label is lost if the process is killed."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from rlhf.common.files import add_path_to_write_errors, flush_to_disk, json_line, read_log
from rlhf.common.numbers import is_number
from rlhf.config.labeling import LabelMode
from rlhf.data.labels import (
    LABEL_COLUMNS,
    MAX_RATING,
    MODE_COLUMNS,
    RANGE_COLUMNS,
    is_rating,
)
from rlhf.errors import UserError

try:
    import fcntl
except ImportError:  # Windows does not have this module
    fcntl = None


log = logging.getLogger(__name__)

_ROW_START = b'{"label_id": '
"""Bytes with which the line of every label begins."""
_MORE_ROWS = "more_rows"
"""Column with the number of further rows that were appended together with a row."""


class LabelFile:
    """A JSON-lines file of labels (`rlhf.data.labels`), to which one process can append.

    A row is on disk when `append` returns. An incomplete last line, which a killed process can
    leave, was not acknowledged to the annotator and is removed.

    Args:
        path: The file, which is created if it does not exist.

    Raises:
        UserError: The name does not end in ``.jsonl``, another process has opened the file, or the
            file contains other rows.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise UserError(f"output: {path} must end in .jsonl")
        with add_path_to_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: FileIO = self.path.open("ab", buffering=0)
        try:
            self._lock()
            self.rows = read_log(self.path)
            check_label_rows(self.path, self.rows)
            self._repair_last_line()
            self._remove_incomplete_group()
            flush_to_disk(self.path.parent)
        except BaseException:
            self.close()
            raise

    def check_mode(self, mode: LabelMode, option: str) -> None:
        """Check that the file has no labels of another mode.

        Args:
            mode: Mode of the labels that will be appended.
            option: Option that names the file, for the error.

        Raises:
            UserError: The file has labels of another mode.
        """
        if other := {row["mode"] for row in self.rows} - {mode}:
            raise UserError(
                f"{option}: {self.path} has labels of mode {min(other)}, not {mode}; give another "
                "file"
            )

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row, see `append_together`."""
        self.append_together([row])

    def append_together(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows and flush them to the disk: all of them, or none.

        Raises:
            OSError: The rows could not be written; the file is unchanged.
            UserError: The file was deleted or replaced since it was opened.
        """
        self._check_not_replaced()
        written_rows: list[dict[str, Any]] = []
        for following, row in zip(reversed(range(len(rows))), rows, strict=True):
            columns = {key: value for key, value in row.items() if key != _MORE_ROWS}
            more = {_MORE_ROWS: following} if following else {}
            written_rows.append(
                {"label_id": row["label_id"], **columns, **more}
            )  # see `_ROW_START`
        data = "".join(map(json_line, written_rows)).encode()
        size = os.fstat(self._file.fileno()).st_size
        with add_path_to_write_errors(self.path):
            try:
                written = self._file.write(data)
                os.fsync(self._file.fileno())
            except OSError:
                os.truncate(self._file.fileno(), size)
                raise
            if written != len(data):
                os.truncate(self._file.fileno(), size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.rows += written_rows

    def _check_not_replaced(self) -> None:
        """Check that the path still refers to the open file, because rows would be lost otherwise.

        Raises:
            UserError: The file was deleted or replaced.
        """
        try:
            is_same = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise UserError(f"{self.path} was deleted or replaced; start rlhf label again")

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def __enter__(self) -> LabelFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _lock(self) -> None:
        """Lock the file if locks are supported; raise UserError if another process has the lock."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path} is open in another `rlhf label` or `rlhf chat`; end it, or give each "
                "annotator a file (rlhf labels agreement reads several files)"
            ) from None
        except OSError:
            pass  # some network file systems do not support locks

    def _repair_last_line(self) -> None:
        """Remove an incomplete last line, and end a complete one with a line break.

        Raises:
            UserError: The incomplete line is not the start of a label.
        """
        text = self.path.read_bytes()
        last = text[text.rfind(b"\n") + 1 :]
        if not last:
            return
        try:
            json.loads(last)
        except ValueError:
            if not (last.startswith(_ROW_START) or _ROW_START.startswith(last)):
                raise UserError(
                    f"{self.path}: the last line is not a label; give another file"
                ) from None
            os.truncate(self._file.fileno(), len(text) - len(last))
        else:
            self._file.write(b"\n")

    def _remove_incomplete_group(self) -> None:
        """Remove the last rows if only a part of the rows of one `append_together` is in the file.

        A process that is killed, or a machine that stops, can leave such a part. No row of it was
        acknowledged to the annotator.
        """
        count, expected = 0, self.rows[-1].get(_MORE_ROWS) if self.rows else None
        if not expected:
            return
        while count < len(self.rows) and self.rows[-1 - count].get(_MORE_ROWS) == expected:
            count, expected = count + 1, expected + 1
        log.warning("%s: removed %d rows of a vote that was not saved completely", self.path, count)
        lines = self.path.read_bytes().splitlines(keepends=True)
        while lines and count:
            count -= bool(lines.pop().strip())
            self.rows.pop()
        os.truncate(self._file.fileno(), sum(map(len, lines)))


def check_label_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Check that the rows of a file are labels.

    Raises:
        UserError: A row does not have the columns of a label, or a value of the wrong type.
    """
    for number, row in enumerate(rows, start=1):
        if reason := _why_not_a_label(row):
            raise UserError(f"{path}, row {number} is not a label ({reason}); give another file")


def _why_not_a_label(row: Mapping[str, Any]) -> str:
    """Return the reason why a row is not a label, or "" if it is one."""
    needed = LABEL_COLUMNS - {"prompt"} if row.get("undoes") else LABEL_COLUMNS
    if missing := sorted(needed - row.keys()):
        return f"no {missing[0]}"
    for name in ("label_id", "item_id", "annotator", "mode"):
        if not isinstance(row[name], str):
            return f"{name} is not a text"
    for name in ("undoes", "time", "note", "vote_id"):
        if not isinstance(row.get(name) or "", str):
            return f"{name} is not a text"
    mode = row["mode"]
    if mode not in MODE_COLUMNS:
        return "unknown mode"
    if row.get("skipped") not in (None, False, True):
        return "skipped is not true or false"
    if row.get("gold") is not None and (mode != "pairs" or row["gold"] not in ("a", "b")):
        return "gold is not a or b"
    for name in (*RANGE_COLUMNS.values(), _MORE_ROWS):
        if row.get(name) is not None and not is_rating(row[name]):
            return f"{name} is not a whole number from 0 to {MAX_RATING}"
    if row.get("undoes"):
        return ""
    if not (row.get("seconds") is None or is_number(row["seconds"])):
        return "seconds is not a number"
    if not _is_conversation(row["prompt"]):
        return "prompt is not a list of messages"
    replies = [row[n] for n in ("response_a", "response_b", "completion") if row.get(n) is not None]
    ranked = row["replies"] if row.get("replies") is not None else []
    if not isinstance(ranked, list) or not all(map(_is_conversation, [*replies, *ranked])):
        return "a reply is not a list of messages"
    return "" if row.get("skipped") else _why_not_an_answer(row)


def _why_not_an_answer(row: Mapping[str, Any]) -> str:
    """Return the reason why the columns of a label's mode are invalid, or "" if they are valid."""
    mode: LabelMode = row["mode"]
    for name in MODE_COLUMNS[mode]:
        if name != "margin" and row.get(name) is None:
            return f"no {name}"
    if mode == "rankings":
        if not isinstance(row["ranks"], list):
            return "ranks are not a list"
        if len(row["replies"]) != len(row["ranks"]) or not all(map(is_number, row["ranks"])):
            return "ranks are not a number for each reply"
    if mode == "pairs" and row["winner"] not in ("a", "b", "tie"):
        return "winner is not a, b or tie"
    if not (row.get("margin") is None or is_number(row["margin"])):
        return "margin is not a number"
    if mode == "demonstrations" and not row["completion"]:
        return "completion has no message"
    if mode == "ratings" and not is_rating(row["rating"]):
        return f"rating is not a whole number from 0 to {MAX_RATING}"
    return ""


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in value
    )
