"""Convert the rows of a table to canonical rows, block by block, in one or several processes.

Everything that the loader records about a row (its outcome, the columns that were used, and the
ignored parts of cells) is stored as the index of a `RowConversionRecord`. The counts of any
selection and order of the rows are computed from these indices.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rlhf.config.data import DataSpec, Kind
from rlhf.data.columns import ColumnAssignment, Row
from rlhf.data.messages import RowDropped
from rlhf.data.reader import TableReader, winner_values
from rlhf.data.splits import prompt_key
from rlhf.data.tables import Table


@dataclass(frozen=True)
class RowConversionSettings:
    """Everything that determines the canonical rows of a table."""

    spec: DataSpec
    kind: Kind
    keep: tuple[str, ...]


@dataclass(frozen=True)
class TableHeader:
    """Properties of a whole table, which every process needs to convert a block."""

    first_row_indices: np.ndarray
    """Indices of the first rows of the table, by which its schema is recognized."""
    column_names: frozenset[str]
    layouts: list[ColumnAssignment]


class RowConversionRecord(NamedTuple):
    """Record of the conversion of one row of a table.

    It contains the outcomes, the ignored parts of cells, and the skipped and the used columns.
    """

    outcomes: tuple[str | None, ...]
    """The reason why a row is dropped, or None for a canonical row; in order."""
    ignored: tuple[tuple[str, int], ...]
    skipped: tuple[tuple[str, int], ...]
    used_columns: tuple[str, ...]


class ConvertedBlock(NamedTuple):
    """Result of the conversion of a block of rows of a table."""

    records: list[RowConversionRecord]
    record_indices: np.ndarray
    """[B], index in `records` for each row of the block."""
    rows: list[bytes]
    """JSON of the canonical rows."""
    prompt_keys: bytes
    """Prompt keys of the canonical rows, 32 bytes each."""


class BlockReader:
    """Reads blocks of a table; see the methods for the tasks.

    Args:
        table: The table of the source.
        settings: Settings of the conversion.
    """

    def __init__(self, table: Table, settings: RowConversionSettings) -> None:
        self.table, self.settings = table, settings
        self._reader: TableReader | None = None

    def __call__(self, task: tuple[str, tuple[Any, ...]]) -> Any:
        """Run a task: the name of a method, and its arguments."""
        name, arguments = task
        return getattr(self, name)(*arguments)

    def columns_and_blank_rows(self, indices: np.ndarray) -> tuple[set[str], np.ndarray]:
        """Return the names of all columns of these rows, and which of the rows are blank lines."""
        rows = self.table.read(indices)
        names = {name for row in rows if row is not None for name in row}
        return names, np.array([row is None for row in rows], bool)

    def winner_column_values(self, column: str, indices: np.ndarray) -> set[str]:
        """Return the distinct values of a winner column."""
        return winner_values((row for row in self.table.read(indices) if row), column)

    def convert(self, header: TableHeader, indices: np.ndarray) -> ConvertedBlock | None:
        """Convert the rows with these indices, none of which is a blank line.

        The result is None if a row cannot be stored as JSON without a change.
        """
        reader = self._reader or self._make_reader(header)
        self._reader = reader
        index_by_record: dict[RowConversionRecord, int] = {}
        record_indices: list[int] = []
        texts: list[bytes] = []
        keys: list[bytes] = []
        check = self.table.columns is not None  # JSON files contain only JSON
        for row in self.table.read(indices):
            assert row is not None
            reader.ignored, reader.skipped, reader.used_columns = Counter(), Counter(), set()
            outcomes: list[str | None] = []
            for outcome in reader.convert_table_row(row):
                if isinstance(outcome, RowDropped):
                    outcomes.append(str(outcome))
                    continue
                text = (
                    None
                    if check and not _survives_json_round_trip(outcome)
                    else _json_bytes(outcome)
                )
                if text is None:
                    return None
                outcomes.append(None)
                texts.append(text)
                keys.append(bytes.fromhex(prompt_key(outcome)))
            record = RowConversionRecord(
                tuple(outcomes),
                tuple(reader.ignored.items()),
                tuple(reader.skipped.items()),
                tuple(sorted(reader.used_columns)),
            )
            record_indices.append(index_by_record.setdefault(record, len(index_by_record)))
        return ConvertedBlock(
            list(index_by_record), np.array(record_indices, np.int32), texts, b"".join(keys)
        )

    def replace_table(self, table: Table, reader: TableReader) -> None:
        """Read another table, which was gathered from this one, with ``reader`` from now on."""
        self.table, self._reader = table, reader

    def _make_reader(self, header: TableHeader) -> TableReader:
        first_rows = [row for row in self.table.read(header.first_row_indices) if row is not None]
        reader = make_table_reader(first_rows, self.settings, header.column_names)
        reader.layouts = header.layouts
        return reader


def make_table_reader(
    rows: Sequence[Row], settings: RowConversionSettings, column_names: frozenset[str]
) -> TableReader:
    """Return a reader for the table with these first rows and these columns.

    Raises:
        UserError: As in `TableReader`.
    """
    return TableReader(
        rows,
        settings.kind,
        settings.spec,
        keep=settings.keep,
        column_names=column_names,
    )


def _json_bytes(row: dict[str, Any]) -> bytes | None:
    """Return the JSON of a row; None if a value has a type that JSON does not have."""
    try:
        try:
            return json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a lone surrogate in an additional column
            return json.dumps(row).encode()
    except (TypeError, ValueError):
        return None


def _survives_json_round_trip(value: Any) -> bool:
    """Return whether a value is equal after a conversion to JSON and back, with equal types."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(
            map(_survives_json_round_trip, value.values())
        )
    if isinstance(value, list):
        return all(map(_survives_json_round_trip, value))
    return value is None or type(value) in (str, int, float, bool)
