"""Tables of a data source that are read in blocks instead of as a whole.

`rlhf.data.files` defines the formats and their error messages. Only uncompressed JSON-lines files
are read directly. Other files are first converted to a temporary file that can be read in blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlhf.common.files import expand_user, parse_json_line
from rlhf.config.data import DataSpec
from rlhf.data.files import (
    Row,
    columnar_row_to_json_form,
    data_suffix,
    decoding_errors_as_user_errors,
    iterate_csv,
    parquet_errors_as_user_errors,
    read_file,
    read_rows,
)
from rlhf.errors import UserError

_CHUNK = 2**24
"""Number of bytes that are searched for line breaks at a time."""


class Table(Protocol):
    """Rows that are read by their indices. A table can be sent to other processes."""

    columns: frozenset[str] | None
    """Names of all columns; None if they are known only after all rows are read."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Row | None]:
        """Return the rows with these indices, in this order; None for a blank line.

        Raises:
            UserError: The content of a row is malformed.
        """
        ...


@dataclass
class JsonLinesTable:
    """Lines of a JSON-lines file, including its blank lines.

    Attributes:
        path: The file, which is not compressed.
        name: Path for error messages.
        starts: [N + 1], position in bytes of every line, and the size of the file.
    """

    path: Path
    name: str
    starts: np.ndarray
    columns: frozenset[str] | None = None

    @classmethod
    def open(cls, path: Path, name: str) -> JsonLinesTable:
        """Find the lines of a file and return its table. A line ends only at a newline."""
        positions, position, last = [np.zeros(1, np.int64)], 0, b"\n"
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                breaks = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10)
                positions.append(breaks + (position + 1))
                position += len(chunk)
                last = chunk[-1:]
        if last != b"\n":
            positions.append(np.array([position]))
        return cls(path, name, np.concatenate(positions))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Row | None]:
        """Return rows, see `Table`."""
        rows: list[Row | None] = []
        position = -1
        with self.path.open("rb", buffering=2**20) as file:
            for index in indices:
                start, end = int(self.starts[index]), int(self.starts[index + 1])
                if position != start:
                    file.seek(start)
                raw = file.read(end - start)
                position = end
                rows.append(self._parse(raw, int(index)))
        return rows

    def _parse(self, raw: bytes, index: int) -> Row | None:
        if index == 0:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            at = int(self.starts[index]) + error.start
            raise UserError(f"{self.name}: not UTF-8 text ({error.reason} at byte {at})") from None
        if not line.strip():
            return None
        return parse_json_line(line, f"{self.name}, line {index + 1}")


class ArrowTable:
    """Rows of an Arrow file, which is mapped into memory.

    Args:
        path: The file.
        name: Path for error messages.
        columns: Names of the columns.
        length: Number of rows.
    """

    def __init__(self, path: Path, name: Path, columns: frozenset[str] | None, length: int) -> None:
        self.path, self.name, self.length = path, name, length
        self.columns: frozenset[str] | None = columns

    def __len__(self) -> int:
        return self.length

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowTable, (self.path, self.name, self.columns, self.length)  # without open files

    @cached_property
    def _batches(self) -> list[Any]:
        return open_arrow(self.path).to_batches()

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._batches)])

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Row | None]:
        """Return rows, see `Table`."""
        rows: list[Row | None] = []
        wanted = np.asarray(indices, np.int64)
        batch_of = np.searchsorted(self._starts, wanted, "right") - 1
        # Arrow cannot take rows of every type by their indices, but it can slice all types.
        is_end = (np.diff(wanted) != 1) | (np.diff(batch_of) != 0)
        with decoding_errors_as_user_errors(self.name):
            for run in np.split(np.arange(len(wanted)), np.flatnonzero(is_end) + 1):
                if len(run):
                    number = int(batch_of[run[0]])
                    start = int(wanted[run[0]] - self._starts[number])
                    batch_rows = self._batches[number].slice(start, len(run)).to_pylist()
                    rows += map(columnar_row_to_json_form, batch_rows)
        return rows


@dataclass
class DatasetTable:
    """Rows of a dataset of the library `datasets`."""

    dataset: Any
    columns: frozenset[str] | None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Row | None]:
        """Return rows, see `Table`."""
        columns: Mapping[str, list[Any]] = self.dataset[[int(index) for index in indices]]
        return [
            dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
        ]


@dataclass
class ListTable:
    """Rows in memory."""

    rows: Sequence[Row]
    columns: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Row | None]:
        """Return rows, see `Table`."""
        return [self.rows[index] for index in indices]


def open_table(spec: DataSpec, temporary_folder: Path) -> Table:
    """Open the table of a source.

    Args:
        spec: The source.
        temporary_folder: Folder for temporary files. The caller removes it when the table is not
            needed.

    Raises:
        UserError: As in `rlhf.data.files.read_rows`.
    """
    path = expand_user(spec.path)
    if not path.is_file():
        rows = read_rows(spec)
        return DatasetTable(rows, frozenset(rows[0]))
    suffix = data_suffix(path)
    if suffix == ".jsonl" and path.suffix != ".gz":
        return JsonLinesTable.open(path, str(path))
    if suffix == ".parquet":
        return _convert_parquet(path, temporary_folder / "rows.arrow")
    rows = iterate_csv(path) if suffix == ".csv" else read_file(path)
    lines = temporary_folder / "rows.jsonl"
    _write_lines(rows, lines)
    return JsonLinesTable.open(lines, str(path))


def open_arrow(path: Path) -> Any:
    """Return the table of an Arrow stream file, which is mapped into memory."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _write_lines(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def _convert_parquet(path: Path, target: Path) -> ArrowTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with parquet_errors_as_user_errors(path), pq.ParquetFile(path) as file:
        schema, length = file.schema_arrow, file.metadata.num_rows
        with pa.ipc.new_stream(str(target), schema) as writer:
            for batch in file.iter_batches(batch_size=2000):
                writer.write_batch(batch)
    return ArrowTable(target, path, frozenset(schema.names), length)
