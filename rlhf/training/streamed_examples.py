"""Training examples from a source that is read sequentially during training.

The rows of a block are converted, encoded and shuffled together; the shuffle of a block depends
only on the seed, the epoch and the number of the block. The state of the stream is a position, so a
resumed run continues with exactly the same examples. Memory does not grow with the number of rows.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rlhf.common.worker_pool import WorkerPool
from rlhf.config.data import DataSpec
from rlhf.data.columns import ColumnAssignment, Row
from rlhf.data.messages import RowDropped
from rlhf.data.reader import TableReader, columns_of
from rlhf.data.stream import RowStream, StreamPosition
from rlhf.errors import UserError
from rlhf.reward_models.core import IGNORED
from rlhf.training.examples import Example, ExampleEncoder

log = logging.getLogger(__name__)

BLOCK_ROWS = 5000
"""Number of rows of the source that are shuffled together."""


@dataclass(frozen=True)
class StreamedSource:
    """A source that is streamed.

    Attributes:
        spec: The source.
        seed: Seed of the shuffle.
        processes: Number of processes that encode rows. With 1, the process of the run encodes
            them.
    """

    spec: DataSpec
    seed: int
    processes: int


class EncodedBlock(NamedTuple):
    """Examples of a block of rows, in the order of the source, and the counts of the rows."""

    ids: np.ndarray
    """Token ids of all examples, concatenated."""
    trained: np.ndarray
    """Whether each token is trained on."""
    ends: np.ndarray
    """[B], end of each example in `ids`."""
    counts: Counter[str]
    """Number of rows by reason or note, as in `ExampleEncoder.truncated_and_dropped_counts`."""

    def __len__(self) -> int:
        return len(self.ends)

    def digest(self) -> str:
        """Return a hash of the examples."""
        parts = (self.ids, self.trained, self.ends)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def example(self, index: int) -> Example:
        """Return the example with this index."""
        start = int(self.ends[index - 1]) if index else 0
        part = slice(start, int(self.ends[index]))
        labels = np.where(self.trained[part], self.ids[part], IGNORED)
        return Example((self.ids[part].tolist(),), (labels.tolist(),))


class ExampleStream:
    """Examples of SFT from a streamed source, in an order that depends only on the seed.

    At the end of the source, the next epoch begins.

    Args:
        source: The source.
        encoder: Encoder of the examples, whose counts are updated.

    Raises:
        UserError: The source is empty, or its format joins several rows to one.
    """

    def __init__(self, source: StreamedSource, encoder: ExampleEncoder) -> None:
        self.source, self.encoder = source, encoder
        self.rows_read = 0
        """Number of rows of the source in the blocks that were begun so far."""
        self._stream = RowStream(source.spec, BLOCK_ROWS)
        first = next(self._stream.blocks(StreamPosition()), None)
        if first is None:
            raise UserError(f"{source.spec.path}: the dataset is empty")
        column_names = frozenset(columns_of(first[0]))
        reader = _make_reader(source.spec, first[0], column_names)
        if reader.schema is not None and reader.schema.gather is not None:
            raise UserError(
                f"{source.spec.path}: data.streaming: a dataset that is read as "
                f"{reader.schema.name} has rows that belong together; remove streaming"
            )
        self._header = (first[0][:100], column_names, reader.layouts)
        self._epoch, self._block, self._taken = 0, 0, 0
        self._start = StreamPosition()  # of the current block
        self._examples_of_epoch = 0
        self._pool: WorkerPool | None = None
        self._blocks: Iterator[tuple[EncodedBlock, StreamPosition, int]] | None = None
        self._current: EncodedBlock | None = None
        self._order: list[int] = []
        self._end = StreamPosition()

    def take(self, count: int) -> list[Example]:
        """Return the next examples.

        Raises:
            UserError: The content of the source is malformed, or an epoch has no example.
        """
        examples: list[Example] = []
        while len(examples) < count:
            if self._current is None or self._taken >= len(self._order):
                self._next_block()
                continue
            examples.append(self._current.example(self._order[self._taken]))
            self._taken += 1
        return examples

    def summary(self) -> str:
        """Return the numbers of rows that were read, truncated and dropped so far."""
        line = f"{self.rows_read:,} rows streamed from {self.source.spec.path}"
        changed = self.encoder.truncated_and_dropped_text()
        return f"{line}: {changed}" if changed else line

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the counts, as values of JSON."""
        return {
            "epoch": self._epoch,
            "block": self._block,
            "taken": self._taken,
            "start": list(self._start),
            "begun": self._current is not None,
            "digest": self._current.digest() if self._current is not None else None,
            "examples_of_epoch": self._examples_of_epoch,
            "rows_read": self.rows_read,
            "changed": dict(self.encoder.truncated_and_dropped_counts),
        }

    def load_state_dict(self, state: Any) -> None:
        """Continue at the position of `state_dict`.

        Raises:
            UserError: The rows of the current block have changed.
        """
        self.close()
        self._epoch, self._block = state["epoch"], state["block"]
        self._start = StreamPosition(*state["start"])
        self._current = None
        if state["begun"]:
            self._load_block()
        digest = self._current.digest() if self._current is not None else None
        if digest != state.get("digest", digest):  # earlier versions recorded no digest
            raise UserError(
                f"{self.source.spec.path}: the rows have changed since the checkpoint was saved; "
                "restore them, or start a new run with --overwrite"
            )
        self._taken = state["taken"]
        self._examples_of_epoch = state["examples_of_epoch"]
        self.rows_read = state["rows_read"]
        self.encoder.truncated_and_dropped_counts = Counter(state["changed"])

    def close(self) -> None:
        """End the worker processes, and discard the blocks that they have read ahead."""
        self._blocks = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _next_block(self) -> None:
        """Begin the block after the current one, or the first block of the next epoch.

        Raises:
            UserError: The epoch that ends has no usable row.
        """
        if self._current is not None:
            self._start, self._block = self._end, self._block + 1
        if self._load_block():
            return
        if not self._examples_of_epoch:
            changed = self.encoder.truncated_and_dropped_text()
            raise UserError(f"{self.source.spec.path}: no usable row ({changed or 'it is empty'})")
        log.info("end of epoch %d: %s", self._epoch + 1, self.summary())
        self._blocks = None
        self._epoch, self._block, self._examples_of_epoch = self._epoch + 1, 0, 0
        self._start, self._current = StreamPosition(), None
        self._load_block()

    def _load_block(self) -> bool:
        """Load the block at `_start` and add its counts; return False at the end of the source."""
        if self._blocks is None:
            self._blocks = self._encoded_blocks(self._start)
        loaded = next(self._blocks, None)
        if loaded is None:
            return False
        self._current, self._end, num_rows = loaded
        generator = np.random.default_rng([self.source.seed, self._epoch, self._block])
        self._order = generator.permutation(len(self._current)).tolist()
        self._taken = 0
        self._examples_of_epoch += len(self._current)
        self.rows_read += num_rows
        self.encoder.truncated_and_dropped_counts += self._current.counts
        return True

    def _encoded_blocks(
        self, start: StreamPosition
    ) -> Iterator[tuple[EncodedBlock, StreamPosition, int]]:
        """Yield encoded blocks from a position on, with the position after and the number of rows.

        Worker processes are started at the first call.
        """
        if self._pool is None:
            arguments = (
                self.source.spec,
                *self._header,
                self.encoder.chat_format.tokenizer,
                self.encoder.max_length,
                sorted(self.encoder.chat_format.stop_ids),
            )
            factory = "rlhf.training.streamed_examples:StreamEncoder"
            self._pool = WorkerPool(self.source.processes, factory, arguments)
        for_rows, for_positions = itertools.tee(self._stream.blocks(start))
        positions = ((position, len(rows)) for rows, position in for_positions)
        encoded = self._pool.map(rows for rows, _ in for_rows)
        for block, (position, count) in zip(encoded, positions, strict=True):
            yield block, position, count


class StreamEncoder:
    """Converts and encodes blocks of rows, with the settings of the stream's encoder."""

    def __init__(
        self,
        spec: DataSpec,
        first_rows: list[Row],
        column_names: frozenset[str],
        layouts: list[ColumnAssignment],
        tokenizer: Any,
        max_length: int,
        stop_ids: Sequence[int],
    ) -> None:
        self.reader = _make_reader(spec, first_rows, column_names)
        self.reader.layouts = layouts
        self.encoder = ExampleEncoder(tokenizer, max_length=max_length, stop_ids=stop_ids)

    def __call__(self, rows: list[Row]) -> EncodedBlock:
        """Encode a block of rows.

        Raises:
            UserError: The chat template cannot render a row.
        """
        counts: Counter[str] = Counter()
        canonical = []
        for row in rows:
            for outcome in self.reader.convert_table_row(row):
                if isinstance(outcome, RowDropped):
                    counts[f"dropped: {outcome}"] += 1
                else:
                    canonical.append(outcome)
        ids: list[np.ndarray] = []
        trained: list[np.ndarray] = []
        for example, notes in self.encoder.encode(canonical, pairs=False):
            if isinstance(example, RowDropped):
                counts[f"dropped: {example}"] += 1
                continue
            counts.update(notes)
            ids.append(np.array(example.ids[0], np.int32))
            trained.append(np.array(example.labels[0], np.int64) != IGNORED)
        empty = [np.zeros(0, np.int32)]
        return EncodedBlock(
            np.concatenate(ids or empty),
            np.concatenate(trained or [np.zeros(0, bool)]),
            np.cumsum([len(text) for text in ids], dtype=np.int64),
            counts,
        )


def _make_reader(spec: DataSpec, rows: list[Row], column_names: frozenset[str]) -> TableReader:
    return TableReader(rows, "sft", spec, column_names=column_names)
