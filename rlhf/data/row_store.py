"""Canonical rows of a source in a folder: they are read from the disk, not held in memory.

A folder contains the rows in the order of the source, the prompt key of every row, and the
`RowConversionRecord` of every row of the source. None of these depends on the seed, except which
rows are stored for a source with a limit. The order, the limit and the counts of a run are computed
after the folder is opened.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.common.files import read_json
from rlhf.common.worker_pool import WorkerPool
from rlhf.data.files import Row
from rlhf.data.load import SourceCounts, no_rows_message
from rlhf.data.reader import TableReader, notes_on_skipped_cells
from rlhf.data.row_blocks import (
    BlockReader,
    ConvertedBlock,
    RowConversionRecord,
    RowConversionSettings,
    TableHeader,
    make_table_reader,
)
from rlhf.data.tables import ListTable, Table, open_arrow, open_table
from rlhf.errors import UserError

BLOCK_ROWS = 1000
"""Number of rows that a process converts at a time."""
ROWS_PER_PROCESS = 10_000
"""One worker process is started per this many rows, up to the configured number of processes."""
_FIRST_ROWS = 100
_ROWS, _KEYS, _RECORD_INDICES = "rows.arrow", "keys.bin", "effects.npy"
_COUNTS, _INDICES, _TABLE = "counts.npy", "indices.npy", "table.json"


class Unstorable(Exception):
    """Raised for a source with values that JSON cannot represent."""


@dataclass(frozen=True)
class SeededRowSubset:
    """The first `count` rows in the order of a seed (`row_order`), for a source with a limit."""

    seed: str | None
    count: int


def row_order(length: int, seed: str | None) -> np.ndarray:
    """Return the indices of the rows of a table in the order in which `load` uses them.

    They are shuffled with `seed`, or ascending if it is None.
    """
    order = list(range(length))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return np.array(order, np.int64)


def build_row_store(
    folder: Path, settings: RowConversionSettings, *, processes: int, subset: SeededRowSubset | None
) -> None:
    """Read a source, convert its rows, and write them to an empty folder.

    Args:
        folder: Folder to write to.
        settings: Settings of the conversion.
        processes: Maximum number of worker processes.
        subset: The rows to convert; all rows if it is None.

    Raises:
        UserError: As in `rlhf.data.load.load`, except that a source without a usable row is valid.
        Unstorable: A value cannot be represented as JSON.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        table = open_table(settings.spec, Path(temporary))
        if not len(table):
            raise UserError(f"{settings.spec.path}: the dataset is empty")
        count = 0 if isinstance(table, ListTable) else _pool_size(len(table), processes)
        with WorkerPool(count, "rlhf.data.row_blocks:BlockReader", (table, settings)) as pool:
            indices, column_names = _non_blank_rows_and_columns(table, pool)
            if not len(indices):
                raise UserError(f"{settings.spec.path}: the dataset is empty")
            first_rows = _without_blank_lines(table.read(indices[:_FIRST_ROWS]))
            reader = make_table_reader(first_rows, settings, column_names)
            if (column := reader.winner_column) is not None:
                tasks = (
                    ("winner_column_values", (column, block)) for block in _index_blocks(indices)
                )
                reader.check_winners_count_from_zero(set().union(*pool.map(tasks)))
            if reader.schema is not None and reader.schema.gather is not None:
                _write_merged_rows(folder, table, indices, reader, settings, subset)
                return
            header = TableHeader(indices[:_FIRST_ROWS], column_names, reader.layouts)
            converted_rows = _rows_to_convert(len(indices), subset)
            blocks = (indices[block] for block in _index_blocks(converted_rows))
            converted = pool.map(("convert", (header, block)) for block in blocks)
            _write_store(
                folder, converted, reader, length=len(indices), converted_rows=converted_rows
            )


def _write_merged_rows(
    folder: Path,
    table: Table,
    indices: np.ndarray,
    reader: TableReader,
    settings: RowConversionSettings,
    subset: SeededRowSubset | None,
) -> None:
    """Convert and write a table whose schema merges rows, so that all rows must be in memory."""
    assert reader.schema is not None
    assert reader.schema.gather is not None
    gathered = ListTable(
        reader.schema.gather(_without_blank_lines(table.read(indices))), table.columns
    )
    blocks = BlockReader(table, settings)
    blocks.replace_table(gathered, reader)
    header = TableHeader(indices[:0], frozenset(reader.column_names), reader.layouts)
    converted_rows = _rows_to_convert(len(gathered), subset)
    converted = (blocks.convert(header, block) for block in _index_blocks(converted_rows))
    _write_store(folder, converted, reader, length=len(gathered), converted_rows=converted_rows)


def _non_blank_rows_and_columns(
    table: Table, pool: WorkerPool
) -> tuple[np.ndarray, frozenset[str]]:
    """Return the indices of the rows that are not blank lines, and the names of all columns."""
    every = np.arange(len(table))
    if table.columns is not None:
        return every, table.columns
    names: set[str] = set()
    blank = []
    for block_names, is_blank in pool.map(
        ("columns_and_blank_rows", (block,)) for block in _index_blocks(every)
    ):
        names |= block_names
        blank.append(is_blank)
    return every[~np.concatenate(blank)], frozenset(names)


def _write_store(
    folder: Path,
    converted: Iterable[ConvertedBlock | None],
    reader: TableReader,
    *,
    length: int,
    converted_rows: np.ndarray,
) -> None:
    """Write converted blocks and the description of their table.

    Args:
        folder: Folder to write to.
        converted: Result for each block of `converted_rows`.
        reader: Reader of the table, for its columns and schema.
        length: Number of rows of the table.
        converted_rows: Sorted indices of the rows that are converted.

    Raises:
        Unstorable: A result is None.
    """
    import pyarrow as pa

    index_by_record: dict[RowConversionRecord, int] = {}
    record_indices = []
    schema = pa.schema({"row": pa.large_binary()})
    with (
        pa.ipc.new_stream(str(folder / _ROWS), schema) as rows,
        (folder / _KEYS).open("wb") as keys,
    ):
        for block in converted:
            if block is None:
                raise Unstorable
            index_of_record = [
                index_by_record.setdefault(r, len(index_by_record)) for r in block.records
            ]
            record_indices.append(np.array(index_of_record, np.int32)[block.record_indices])
            rows.write_batch(pa.record_batch({"row": pa.array(block.rows, pa.large_binary())}))
            keys.write(block.prompt_keys)
    records = list(index_by_record)
    all_record_indices = np.concatenate(record_indices)
    counts = np.array([record.outcomes.count(None) for record in records], np.int32)[
        all_record_indices
    ]
    np.save(folder / _RECORD_INDICES, all_record_indices)
    np.save(folder / _COUNTS, counts)
    if len(converted_rows) < length:
        np.save(folder / _INDICES, converted_rows)
    description = {
        "length": length,
        "present": sorted(reader.column_names),
        "schema": reader.schema.name if reader.schema else None,
        "columns": reader.layouts[0].columns if reader.layouts else {},
        "for_rewards": reader.with_answer_and_tests,
        "used": [name for name in reader.keep if name in reader.column_names],
        "effects": records,
    }
    (folder / _TABLE).write_text(json.dumps(description), encoding="utf-8")


class RowStore:
    """The canonical rows of one source, in the order of the source.

    Args:
        folder: Folder that `build_row_store` has written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        table = read_json(folder / _TABLE)
        self._length: int = table["length"]
        self._column_names: list[str] = table["present"]
        self._schema: str | None = table["schema"]
        self._columns: dict[str, str] = table["columns"]
        self._used: list[str] = table["used"]
        self._for_rewards: bool = table["for_rewards"]
        self._records = [
            RowConversionRecord(
                tuple(outcomes),
                tuple((what, count) for what, count in ignored),
                tuple((column, count) for column, count in skipped),
                tuple(used),
            )
            for outcomes, ignored, skipped, used in table["effects"]
        ]
        self._record_indices: np.ndarray = np.load(folder / _RECORD_INDICES)
        self._counts: np.ndarray = np.load(folder / _COUNTS)
        path = folder / _INDICES
        self._indices: np.ndarray | None = np.load(path) if path.exists() else None
        size = int(self._counts.sum())
        self.prompt_keys = (
            np.memmap(folder / _KEYS, "S32", "r", shape=(size,)) if size else np.zeros(0, "S32")
        )
        """[N], prompt key of every canonical row."""
        self._rows = ArrowBlobs(folder / _ROWS)

    def __len__(self) -> int:
        return len(self.prompt_keys)

    def row(self, position: int) -> dict[str, Any]:
        """Return the canonical row at a position of the store."""
        return json.loads(self._rows[position])

    def counts_and_positions(
        self, path: str, *, seed: str | None, limit: int | None
    ) -> tuple[SourceCounts, np.ndarray] | None:
        """Return the counts and the rows of a source for a seed and a limit.

        Args:
            path: Path of the source.
            seed: Seed of the order; the order of the source if it is None.
            limit: Maximum number of rows.

        Returns:
            The counts of the rows and the positions of the rows in the store, in order. The result
            is None if the store contains a subset of the rows that does not reach the limit.

        Raises:
            UserError: No row is usable.
        """
        order = row_order(self._length, seed)
        complete = self._indices is None
        if self._indices is not None:
            where = np.searchsorted(self._indices, order)
            where = np.minimum(where, len(self._indices) - 1)
            held = self._indices[where] == order
            prefix = len(order) if held.all() else int(np.argmin(held))
            order, tables = where[:prefix], order[:prefix]
        else:
            tables = order
        reached = np.cumsum(self._counts[order])
        if limit is not None and len(reached) and reached[-1] >= limit:
            used = int(np.searchsorted(reached, limit)) + 1
            order, tables = order[:used], tables[:used]
        elif not complete:
            return None
        counts = self._source_counts(path, order, tables)
        positions = self._positions(order)[:limit]
        if self._schema is not None and seed is not None:
            shuffled = positions.tolist()
            random.Random(f"{seed}/rows").shuffle(shuffled)
            positions = np.array(shuffled, np.int64)
        if not len(positions):
            raise UserError(no_rows_message(counts, self._columns))
        return counts, positions

    def _positions(self, order: np.ndarray) -> np.ndarray:
        """Return the positions of the canonical rows of table rows, in the order of these."""
        starts = np.cumsum(self._counts) - self._counts
        counts = self._counts[order]
        ends = np.cumsum(counts)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
        return np.repeat(starts[order], counts) + within

    def _source_counts(
        self, path: str, order: np.ndarray, table_indices: np.ndarray
    ) -> SourceCounts:
        """Return the counts that reading the rows in this order gives.

        Args:
            path: Path of the source.
            order: Indices in the store of the rows that are read.
            table_indices: Indices of these rows in the table.
        """
        record_indices = self._record_indices[order]
        numbers, first, counts = np.unique(record_indices, return_index=True, return_counts=True)
        lowest = np.full(len(self._records), self._length, np.int64)
        np.minimum.at(lowest, record_indices, table_indices)
        dropped, ignored, skipped = Counter(), Counter(), Counter()
        first_dropped: dict[str, int] = {}
        used, total = set(self._used), self._length
        for at in np.argsort(first):
            number, count = int(numbers[at]), int(counts[at])
            record = self._records[number]
            total += (len(record.outcomes) - 1) * count
            used.update(record.used_columns)
            for reason in record.outcomes:
                if reason is not None:
                    dropped[reason] += count
                    index = int(lowest[number])
                    first_dropped[reason] = min(index, first_dropped.get(reason, index))
            for what, times in record.ignored:
                ignored[what] += times * count
            for column, times in record.skipped:
                skipped[column] += times * count
        ignored.update(notes_on_skipped_cells(skipped, used))
        unused = tuple(sorted(set(self._column_names) - used))
        return SourceCounts(
            path, total, dropped, first_dropped, ignored, unused, self._schema, self._for_rewards
        )


class ArrowBlobs:
    """The values of a column of binary data in an Arrow file, which is mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._chunks = open_arrow(path).column(0).chunks
        lengths = [len(chunk) for chunk in self._chunks]
        self._starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> bytes:
        chunk = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._chunks[chunk][index - int(self._starts[chunk])].as_py()


def _pool_size(length: int, processes: int) -> int:
    return min(processes, -(-length // ROWS_PER_PROCESS))


def _rows_to_convert(length: int, subset: SeededRowSubset | None) -> np.ndarray:
    """Return the sorted indices of the rows to convert; those of all rows without a `subset`."""
    if subset is None or subset.count >= length:
        return np.arange(length)
    return np.sort(row_order(length, subset.seed)[: subset.count])


def _index_blocks(indices: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), BLOCK_ROWS):
        yield indices[start : start + BLOCK_ROWS]


def _without_blank_lines(rows: Sequence[Row | None]) -> list[Row]:
    return [row for row in rows if row is not None]
