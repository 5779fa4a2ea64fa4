"""Training examples in files that are mapped into memory.

Worker processes encode the rows of a `RowStore` once, in the order of the store. The files are
stored in the cache (`rlhf.data.cache`). Their key is a hash of the rows, the tokenizer with its
chat template, and the options and the code of the encoding. An example is read from the file when
it is used.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from rlhf.common.files import read_json, sha256_of
from rlhf.common.worker_pool import WorkerPool
from rlhf.data.cache import cached_entry, content_hash, hash_of
from rlhf.data.messages import RowDropped
from rlhf.data.row_store import RowStore
from rlhf.data.stored_rows import StoredRows, canonical_row_code_hash
from rlhf.data.tables import open_arrow
from rlhf.reward_models.chat_template import template_source
from rlhf.reward_models.core import IGNORED
from rlhf.training.examples import Example, ExampleEncoder, Row

BLOCK_ROWS = 1000
"""Maximum number of rows that a process encodes at a time."""
ROWS_PER_PROCESS = 10_000
"""Maximum number of rows per worker process, until the configured number of processes is
reached."""
_SOURCE_FILES = (
    "common/conversation.py",
    "common/fences.py",
    "common/guards.py",
    "reward_models/chat_template.py",
    "reward_models/core.py",
    "rollout/chat_format.py",
    "rollout/demonstrations.py",
    "rollout/plain_text.py",
    "training/examples.py",
    "training/stored_examples.py",
)
"""Files with the code that determines the examples."""
_EXAMPLES, _OUTCOME_INDICES, _OUTCOMES = "examples.arrow", "outcomes.npy", "outcomes.json"


class EncodingOutcome(NamedTuple):
    """Result of encoding a row."""

    drop_reason: str | None
    """Reason why the row is dropped; None if it is an example."""
    notes: tuple[str, ...] = ()


class StoredExamples(Sequence[Example]):
    """Examples of one or several stores in any order. Every access reads an example from a file.

    Args:
        stores: The stores.
        source: [N], index in `stores` of the store of each example.
        position: [N], position of each example in its store.
    """

    def __init__(
        self, stores: Sequence[ExampleStore], source: np.ndarray, position: np.ndarray
    ) -> None:
        self.stores, self.source, self.position = tuple(stores), source, position

    def __len__(self) -> int:
        return len(self.position)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> StoredExamples: ...
    def __getitem__(self, index: int | slice) -> Example | StoredExamples:
        if isinstance(index, slice):
            return StoredExamples(self.stores, self.source[index], self.position[index])
        return self.stores[self.source[index]].example(int(self.position[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class ExampleStore:
    """The examples of a `RowStore`, or of some of its rows, in a folder.

    Args:
        folder: Folder that `_write_examples` has written.
        encoded_positions: Sorted positions of the encoded rows in the row store; None if all rows
            are encoded.
    """

    def __init__(self, folder: Path, encoded_positions: np.ndarray | None) -> None:
        self._encoded_positions = encoded_positions
        self.outcome_indices: np.ndarray = np.load(folder / _OUTCOME_INDICES)
        """[N], index in `outcomes` for each encoded row."""
        self.outcomes = [
            EncodingOutcome(drop_reason, tuple(notes))
            for drop_reason, notes in read_json(folder / _OUTCOMES)
        ]
        table = open_arrow(folder / _EXAMPLES)
        self._num_texts = sum(name.startswith("ids") for name in table.column_names)
        self._ids = [MemoryMappedIntLists(table.column(f"ids_{i}")) for i in range(self._num_texts)]
        self._run_lengths = [
            MemoryMappedIntLists(table.column(f"runs_{i}")) for i in range(self._num_texts)
        ]
        self._desirable = np.concatenate(
            [np.zeros(0, bool), *(np.asarray(c) for c in table.column("desirable").chunks)]
        )

    def indices_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the indices in this store of the rows at these positions of the row store."""
        return (
            positions
            if self._encoded_positions is None
            else np.searchsorted(self._encoded_positions, positions)
        )

    def example(self, index: int) -> Example:
        """Return the example at an index of the store."""
        ids = tuple(column[index].tolist() for column in self._ids)
        labels = tuple(
            labels_from_run_lengths(text, column[index].tolist())
            for text, column in zip(ids, self._run_lengths, strict=True)
        )
        return Example(ids, labels, desirable=bool(self._desirable[index]))


class MemoryMappedIntLists:
    """A column of lists of int32 in an Arrow table that is mapped into memory."""

    def __init__(self, column: Any) -> None:
        self._parts = []
        for chunk in column.chunks:
            values = chunk.values.to_numpy(zero_copy_only=True)
            self._parts.append((chunk.offsets.to_numpy(zero_copy_only=True), values))
        lengths = [len(offsets) - 1 for offsets, _ in self._parts]
        self._starts = np.cumsum([0, *lengths])

    def __getitem__(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self._starts, index, "right")) - 1
        offsets, values = self._parts[part]
        at = index - int(self._starts[part])
        return values[offsets[at] : offsets[at + 1]]


def ignored_and_trained_run_lengths(labels: Sequence[int]) -> list[int]:
    """Return the lengths of the runs of ignored and of trained labels, starting with ignored ones.

    The first length is 0 if the first label is trained. The sum of the lengths is the number of
    labels.
    """
    trained = np.zeros(len(labels) + 1, bool)
    trained[1:] = np.array(labels, np.int64) != IGNORED
    changes = np.flatnonzero(trained[1:] != trained[:-1]).tolist()
    return [end - start for start, end in itertools.pairwise([0, *changes, len(labels)])]


def labels_from_run_lengths(ids: Sequence[int], run_lengths: Sequence[int]) -> list[int]:
    """Return the labels of a text: its ids in trained runs, and IGNORED in ignored runs.

    ``run_lengths`` is a result of `ignored_and_trained_run_lengths`.
    """
    labels: list[int] = []
    for number, length in enumerate(run_lengths):
        start = len(labels)
        labels += ids[start : start + length] if number % 2 else [IGNORED] * length
    return labels


class CachingEncoder:
    """Encodes rows in memory with an `ExampleEncoder`, and rows in files with the cache.

    Args:
        encoder: The encoder of rows. Its counts of dropped rows and notes are updated.
        pairs: Whether each row has a chosen and a rejected reply.
    """

    def __init__(self, encoder: ExampleEncoder, *, pairs: bool) -> None:
        self.encoder, self.pairs = encoder, pairs
        self._opened: dict[str, ExampleStore] = {}

    def __call__(self, rows: Sequence[Row]) -> Sequence[Example]:
        """Encode rows, or open their examples in the cache.

        Raises:
            UserError: As in `ExampleEncoder`.
        """
        if not isinstance(rows, StoredRows):
            return self.encoder(rows, pairs=self.pairs)
        tokenizer = _tokenizer_hash(self.encoder.chat_format.tokenizer)
        stores: list[ExampleStore] = []
        outcome_indices = np.zeros(len(rows), np.int64)
        index = np.zeros(len(rows), np.int64)
        outcomes: list[EncodingOutcome] = []
        for source, row_store in enumerate(rows.stores):
            of_store = np.flatnonzero(rows.source == source)
            positions = rows.position[of_store]
            store = self._open_or_encode_examples(rows, row_store, positions, tokenizer)
            stores.append(store)
            index[of_store] = store.indices_of(positions)
            outcome_indices[of_store] = store.outcome_indices[index[of_store]] + len(outcomes)
            outcomes += store.outcomes
        found, first, counts = np.unique(outcome_indices, return_index=True, return_counts=True)
        for at in np.argsort(first):
            outcome, row = outcomes[found[at]], rows[int(first[at])]
            self.encoder.count_outcome(outcome.drop_reason, outcome.notes, row, int(counts[at]))
        is_example = np.array([outcome.drop_reason is None for outcome in outcomes], bool)
        kept = np.flatnonzero(is_example[outcome_indices])
        examples = StoredExamples(stores, rows.source[kept], index[kept])
        self.encoder.check_some_remain(examples)
        return examples

    def _open_or_encode_examples(
        self, rows: StoredRows, store: RowStore, positions: np.ndarray, tokenizer: str
    ) -> ExampleStore:
        """Open the examples of a row store, which are encoded if they are not in the cache.

        All rows of the store are encoded if at least half of them are used, so that runs with other
        seeds can use the same files. Otherwise, only the rows at `positions` are encoded.
        """
        options = {
            "code": _code_hash(),
            "rows": store.folder.name,
            "tokenizer": tokenizer,
            "max_length": self.encoder.max_length,
            "stop_ids": sorted(self.encoder.chat_format.stop_ids),
            "pairs": self.pairs,
        }
        key, encoded_positions = hash_of(**options), None
        if key not in self._opened and 2 * len(positions) < len(store):
            encoded_positions = np.sort(positions)
            key = hash_of(
                **options, positions=hashlib.sha256(encoded_positions.tobytes()).hexdigest()
            )
        if key not in self._opened:
            encoded = np.arange(len(store)) if encoded_positions is None else encoded_positions

            def build(folder: Path) -> None:
                arguments = (
                    store.folder,
                    self.encoder.chat_format.tokenizer,
                    self.encoder.max_length,
                    sorted(self.encoder.chat_format.stop_ids),
                    self.pairs,
                )
                _write_examples(folder, encoded, arguments, rows.preparation.processes)

            target = rows.preparation.folder / f"examples-{key}"
            self._opened[key] = ExampleStore(cached_entry(target, build), encoded_positions)
        return self._opened[key]


def _write_examples(
    folder: Path, positions: np.ndarray, encoder_arguments: tuple[Any, ...], processes: int
) -> None:
    """Encode rows of a store, and write the examples to an empty folder.

    Args:
        folder: Folder to write to.
        positions: Sorted positions of the rows in the store.
        encoder_arguments: Arguments of `BlockEncoder`.
        processes: Maximum number of worker processes.
    """
    import pyarrow as pa

    index_by_outcome: dict[EncodingOutcome, int] = {}
    outcome_indices = []
    starts = range(0, len(positions), BLOCK_ROWS)
    blocks = (positions[start : start + BLOCK_ROWS] for start in starts)
    count = min(processes, -(-len(positions) // ROWS_PER_PROCESS))
    writer = None
    with WorkerPool(count, "rlhf.training.stored_examples:BlockEncoder", encoder_arguments) as pool:
        for outcomes, index_of_row, batch in pool.map(blocks):
            index_of_outcome = [
                index_by_outcome.setdefault(o, len(index_by_outcome)) for o in outcomes
            ]
            outcome_indices.append(np.array(index_of_outcome, np.int32)[index_of_row])
            if writer is None:
                writer = pa.ipc.new_stream(str(folder / _EXAMPLES), batch.schema)
            writer.write_batch(batch)
    assert writer is not None
    writer.close()
    np.save(folder / _OUTCOME_INDICES, np.concatenate(outcome_indices))
    (folder / _OUTCOMES).write_text(json.dumps(list(index_by_outcome)), encoding="utf-8")


class BlockEncoder:
    """Encodes blocks of rows of a row store.

    Args:
        folder: Folder of the row store.
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of tokens of a text.
        stop_ids: Ids of the tokens that end a reply.
        pairs: Whether each row has a chosen and a rejected reply.
    """

    def __init__(
        self, folder: Path, tokenizer: Any, max_length: int, stop_ids: Sequence[int], pairs: bool
    ) -> None:
        self.store, self.pairs = RowStore(folder), pairs
        self.encoder = ExampleEncoder(tokenizer, max_length=max_length, stop_ids=stop_ids)

    def __call__(self, positions: np.ndarray) -> tuple[list[EncodingOutcome], np.ndarray, Any]:
        """Encode the rows at these positions.

        Returns:
            The distinct outcomes, the index of the outcome of each row, and the record batch of the
            examples, with empty lists for dropped rows.
        """
        import pyarrow as pa

        rows = [self.store.row(int(position)) for position in positions]
        index_by_outcome: dict[EncodingOutcome, int] = {}
        outcome_indices = []
        num_texts = 2 if self.pairs else 1
        ids: list[list[list[int]]] = [[] for _ in range(num_texts)]
        runs: list[list[list[int]]] = [[] for _ in range(num_texts)]
        desirable = []
        for example, notes in self.encoder.encode(rows, self.pairs):
            dropped = isinstance(example, RowDropped)
            outcome = EncodingOutcome(str(example) if dropped else None, tuple(sorted(notes)))
            outcome_indices.append(index_by_outcome.setdefault(outcome, len(index_by_outcome)))
            for text in range(num_texts):
                ids[text].append([] if dropped else example.ids[text])
                runs[text].append(
                    [] if dropped else ignored_and_trained_run_lengths(example.labels[text])
                )
            desirable.append(dropped or example.desirable)
        kind = pa.list_(pa.int32())
        columns = {f"ids_{i}": pa.array(texts, kind) for i, texts in enumerate(ids)}
        columns |= {f"runs_{i}": pa.array(lengths, kind) for i, lengths in enumerate(runs)}
        columns["desirable"] = pa.array(np.array(desirable, np.uint8), pa.uint8())
        return list(index_by_outcome), np.array(outcome_indices, np.int32), pa.record_batch(columns)


@cache
def _code_hash() -> str:
    """Return a hash of the code that determines examples, and of the libraries' versions."""
    root = Path(__file__).parents[1]
    sources = {name: sha256_of(root / name) for name in _SOURCE_FILES}
    versions = [version(name) for name in ("jinja2", "tokenizers", "transformers")]
    return hash_of(data=canonical_row_code_hash(), sources=sources, versions=versions)


def _tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of the files of a tokenizer, including its chat template and its options.

    If the template can render the date, the hash depends on the current date.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = content_hash(Path(folder))
    today = None
    if "strftime_now" in template_source(tokenizer):  # the rendered text depends on the date
        today = _today()
    return hash_of(type=type(tokenizer).__name__, files=files, today=today)


def _today() -> str:
    return datetime.date.today().isoformat()
