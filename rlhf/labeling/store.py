"""Append labels to a file so that a killed process loses none."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.common.files import add_path_to_write_errors, flush_to_disk, json_line, read_log
from rlhf.data.labels import LABEL_COLUMNS
from rlhf.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


_ROW_START = b'{"label_id": '
"""How the line of every label begins."""


class LabelFile:
    """A JSON-lines file of labels (`rlhf.data.labels`) that one process at a time appends to.

    A row is on the disk when `append` returns. An incomplete last line, which a killed process can
    leave, was not acknowledged to the annotator and is removed.

    Args:
        path: The file, which is created if it does not exist.

    Raises:
        UserError: Another process has opened the file, or the file contains other rows.
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
            self._complete_last_line()
            flush_to_disk(self.path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row and flush it to the disk.

        Raises:
            OSError: The row could not be written; the file is unchanged.
        """
        row = {"label_id": row["label_id"], **row}  # see `_ROW_START`
        data = json_line(row).encode()
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
        self.rows.append(row)

    def close(self) -> None:
        """Close the file, which ends the lock."""
        self._file.close()

    def __enter__(self) -> LabelFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output: {self.path} is open in another `rlhf label`; end it, or give each "
                "annotator a file (rlhf labels agreement reads several files)"
            ) from None
        except OSError:
            pass  # some network file systems have no locks

    def _complete_last_line(self) -> None:
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


def check_label_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Check that the rows of a file are labels.

    Raises:
        UserError: A row does not have the columns of a label.
    """
    for number, row in enumerate(rows, start=1):
        needed = LABEL_COLUMNS - {"prompt"} if row.get("undoes") else LABEL_COLUMNS
        if missing := sorted(needed - row.keys()):
            raise UserError(
                f"{path}, row {number} is not a label (no {missing[0]}); give another file"
            )
