"""Read a source forward in blocks, without a copy and without its number of rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.common.files import expand_user, open_text, parse_json_line
from rlhf.config.data import DataSpec
from rlhf.data.files import (
    READERS,
    Row,
    columnar_row_to_json_form,
    data_suffix,
    decoding_errors_as_user_errors,
    existing_path_or_hub_id,
    iterate_csv,
    iterate_parquet,
    open_with_datasets,
)
from rlhf.errors import UserError

_FORMATS = (".jsonl", ".csv", ".parquet")
"""Formats of files that can be read forward."""


class StreamPosition(NamedTuple):
    """A position between two blocks of a source."""

    rows: int = 0
    """Number of rows before the position."""
    lines: int = 0
    """Number of lines before the position in an uncompressed JSON-lines file; otherwise 0."""
    byte: int = 0
    """Number of bytes before the position in an uncompressed JSON-lines file; otherwise 0."""


@dataclass(frozen=True)
class RowStream:
    """The rows of a source, in the order of the source.

    Attributes:
        spec: The source.
        block_rows: Number of rows of a block. The last block of a source can be shorter.

    Raises:
        UserError: The source does not exist, or is a file that cannot be read forward.
    """

    spec: DataSpec
    block_rows: int

    def __post_init__(self) -> None:
        path = existing_path_or_hub_id(self.spec)
        suffix = data_suffix(path)
        if path.is_file() and suffix in READERS and suffix not in _FORMATS:
            raise UserError(
                f"{path}: a {suffix} file cannot be streamed; convert it to one of "
                f"{', '.join(_FORMATS)}, or remove data.streaming"
            )

    def blocks(self, start: StreamPosition) -> Iterator[tuple[list[Row], StreamPosition]]:
        """Yield blocks of rows with the positions after them.

        Args:
            start: Position before the first block. An uncompressed JSON-lines file is read from
                there. Other sources are read from their start, and rows are skipped.

        Raises:
            UserError: The source does not exist, or its content is malformed.
        """
        path = expand_user(self.spec.path)
        if path.is_file() and data_suffix(path) == ".jsonl" and path.suffix != ".gz":
            yield from self._json_lines_blocks(path, start)
            return
        rows = itertools.islice(self._rows_from_start(path), start.rows, None)
        position = start
        while block := list(itertools.islice(rows, self.block_rows)):
            position = StreamPosition(position.rows + len(block))
            yield block, position

    def _json_lines_blocks(
        self, path: Path, start: StreamPosition
    ) -> Iterator[tuple[list[Row], StreamPosition]]:
        rows, lines, byte = start
        block: list[Row] = []
        with path.open("rb", buffering=2**20) as file:
            file.seek(byte)
            for raw in file:
                text = raw if lines else raw.removeprefix(b"\xef\xbb\xbf")
                lines += 1
                byte += len(raw)
                try:
                    line = text.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}, line {lines}: not UTF-8 text ({error.reason})"
                    ) from None
                if line.strip():
                    block.append(parse_json_line(line, f"{path}, line {lines}"))
                if len(block) == self.block_rows:
                    rows += len(block)
                    yield block, StreamPosition(rows, lines, byte)
                    block = []
        if block:
            yield block, StreamPosition(rows + len(block), lines, byte)

    def _rows_from_start(self, path: Path) -> Iterator[Row]:
        if not path.is_file():
            rows: Any = open_with_datasets(self.spec, path, streaming=True)
            return map(columnar_row_to_json_form, rows)
        if data_suffix(path) == ".csv":
            return iterate_csv(path)
        if data_suffix(path) == ".parquet":
            return iterate_parquet(path)
        return _rows_of_compressed_json_lines(path)


def _rows_of_compressed_json_lines(path: Path) -> Iterator[Row]:
    with decoding_errors_as_user_errors(path), open_text(path, newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield parse_json_line(line, f"{path}, line {number}")
