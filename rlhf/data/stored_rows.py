"""Load datasets of any size as rows on the disk, with the same results as `rlhf.data.load.load`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np

from rlhf.common.files import expand_user, sha256_of
from rlhf.config.data import DataSpec, Kind
from rlhf.data.cache import cached_entry, content_hash, hash_of
from rlhf.data.files import read_rows
from rlhf.data.load import (
    LoadedRows,
    checked_specs,
    combine_source_counts,
    mixture_sizes,
    source_seed,
)
from rlhf.data.row_blocks import RowConversionSettings
from rlhf.data.row_store import RowStore, SeededRowSubset, build_row_store
from rlhf.data.schemas import SCHEMAS
from rlhf.data.splits import check_distinct_prompts, held_out_size

MIN_BYTES = 4 * 2**20
"""Sources of fewer bytes in total are read into memory, which is quicker."""
_COMPRESSION = 4
"""Assumed ratio of the sizes of a file before and after compression."""
_LIMIT_FACTOR, _LIMIT_EXTRA = 2, 1000
"""For a source with a limit, `_LIMIT_FACTOR * limit + _LIMIT_EXTRA` rows are converted first."""
_CODE_FILES = (
    "common/conversation.py",
    "common/files.py",
    "common/guards.py",
    "common/user_code.py",
    "config/data.py",
    "config/labeling.py",
    "reward_models/notation/lexer.py",
    "reward_models/notation/marks.py",
)
"""Files outside this folder with code that determines canonical rows."""


@dataclass(frozen=True)
class DataPreparationSettings:
    """Settings of the preparation of data.

    Attributes:
        folder: Folder of the cache, see `rlhf.data.cache`.
        processes: Maximum number of worker processes.
    """

    folder: Path
    processes: int


class StoredRows(Sequence[dict[str, Any]]):
    """Rows of one or several stores in any order; every access reads the row from the disk.

    Args:
        stores: The stores.
        source: [N], index in `stores` of the store of each row.
        position: [N], position of each row in its store.
        preparation: Settings for the preparation of data from these rows.
    """

    def __init__(
        self,
        stores: Sequence[RowStore],
        source: np.ndarray,
        position: np.ndarray,
        preparation: DataPreparationSettings,
    ) -> None:
        self.stores, self.source, self.position = tuple(stores), source, position
        self.preparation = preparation

    def __len__(self) -> int:
        return len(self.position)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | StoredRows:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self.stores[self.source[index]].row(int(self.position[index]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: np.ndarray) -> StoredRows:
        """Return the rows with these indices, in this order."""
        return StoredRows(
            self.stores, self.source[indices], self.position[indices], self.preparation
        )

    def prompt_keys(self) -> np.ndarray:
        """Return the prompt keys of the rows, an array [N] of strings of 32 bytes."""
        keys = np.empty(len(self), "S32")
        for number, store in enumerate(self.stores):
            of_store = self.source == number
            keys[of_store] = store.prompt_keys[self.position[of_store]]
        return keys


def are_large(specs: Sequence[DataSpec]) -> bool:
    """Return whether sources are so large that `load_stored` is better than `load`."""
    return sum(map(_size_in_bytes, specs)) >= MIN_BYTES


def load_stored(
    specs: DataSpec | Sequence[DataSpec],
    kind: Kind,
    *,
    seed: int | None,
    preparation: DataPreparationSettings,
    keep: Sequence[str] = (),
) -> LoadedRows:
    """Load datasets like `rlhf.data.load.load`, but with rows on the disk.

    The rows, their order and all counts are those of `load`. The rows are prepared once and then
    read from the cache, whose folder is in `preparation`. The other arguments are those of `load`.

    Raises:
        UserError: As in `load`.
        Unstorable: A source has values that JSON cannot represent.
    """
    specs = checked_specs(specs, kind)
    stores, counts, chosen = [], [], []
    for number, spec in enumerate(specs):
        settings = RowConversionSettings(spec, kind, tuple(keep))
        store, selected = _open_store_and_select_rows(
            settings, source_seed(seed, number), preparation
        )
        stores.append(store)
        counts.append(selected[0])
        chosen.append(selected[1])
    sizes = mixture_sizes([len(rows) for rows in chosen], [spec.weight for spec in specs])
    source = np.repeat(np.arange(len(specs)), sizes).astype(np.int16)
    position = np.concatenate([rows[:size] for rows, size in zip(chosen, sizes, strict=True)])
    if len(specs) > 1 and seed is not None:
        order = list(range(len(position)))
        random.Random(seed).shuffle(order)
        source, position = source[order], position[order]
    return combine_source_counts(StoredRows(stores, source, position, preparation), counts, sizes)


def split_stored_by_prompt(
    rows: StoredRows, *, fraction: float, seed: int
) -> tuple[StoredRows, StoredRows]:
    """Split rows like `rlhf.data.splits.split_by_prompt`, without reading them.

    Raises:
        UserError: `fraction` is not between 0 and 1, or there are fewer than two distinct prompts.
    """
    size = held_out_size(len(rows), fraction, None)
    keys, group, counts = np.unique(rows.prompt_keys(), return_inverse=True, return_counts=True)
    check_distinct_prompts(len(rows), len(keys))
    raw = np.ascontiguousarray(keys).view(np.uint8).reshape(-1, 32)
    hashes = [hashlib.sha256(f"{seed}/{key.tobytes().hex()}".encode()).digest() for key in raw]
    order = np.argsort(np.array(hashes, "S32"), kind="stable")
    held, taken = np.zeros(len(keys), bool), 0
    for number, count in zip(order.tolist(), counts[order].tolist(), strict=True):
        if taken + count <= size:
            held[number] = True
            taken += count
    if not taken:
        held[order[np.argmin(counts[order])]] = True
    is_held = held[group]
    return rows.take(np.flatnonzero(~is_held)), rows.take(np.flatnonzero(is_held))


def count_shared_prompts(rows: Sequence[dict[str, Any]], against: Sequence[dict[str, Any]]) -> int:
    """Return the number of `rows` whose prompt is also a prompt of `against`."""
    keys, others = _prompt_keys(rows), _prompt_keys(against)
    return int(np.isin(keys, others).sum())


def _prompt_keys(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    if isinstance(rows, StoredRows):
        return rows.prompt_keys()
    from rlhf.data.splits import prompt_key

    return np.array([bytes.fromhex(prompt_key(row)) for row in rows], "S32")


def _open_store_and_select_rows(
    settings: RowConversionSettings, seed: str | None, preparation: DataPreparationSettings
) -> tuple[RowStore, tuple[Any, np.ndarray]]:
    """Open the store of a source, which is built if necessary, and select its rows.

    Returns:
        The store, and its counts and positions, see `RowStore.counts_and_positions`.
    """
    limit = settings.spec.limit
    subsets: list[SeededRowSubset | None] = [None]
    if limit is not None:
        subsets.insert(0, SeededRowSubset(seed, _LIMIT_FACTOR * limit + _LIMIT_EXTRA))
    settings = replace(settings, spec=replace(settings.spec, limit=None, weight=None))
    content = _source_hash(settings.spec)
    for subset in subsets:
        key = hash_of(
            code=canonical_row_code_hash(),
            formats=_added_formats_hash(),
            content=content,
            settings=repr(settings),
            subset=repr(subset),
        )

        def build(folder: Path, subset: SeededRowSubset | None = subset) -> None:
            build_row_store(folder, settings, processes=preparation.processes, subset=subset)

        store = RowStore(cached_entry(preparation.folder / f"rows-{key}", build))
        selected = store.counts_and_positions(settings.spec.path, seed=seed, limit=limit)
        if selected is not None:
            return store, selected
    raise AssertionError("the store of all rows has every row")


@cache
def canonical_row_code_hash() -> str:
    """Return a hash of the code that determines canonical rows."""
    root = Path(__file__).parents[1]
    sources = [*Path(__file__).parent.glob("*.py"), *(root / name for name in _CODE_FILES)]
    # Files of different folders can have the same name.
    names = {source.relative_to(root).as_posix(): source for source in sources}
    return hash_of(sources={name: sha256_of(source) for name, source in names.items()})


def _added_formats_hash() -> str:
    """Return a hash of the files that add data formats; "" if there are none."""
    files = sorted({Path(source) for source in SCHEMAS.sources.values()})
    known = [file for file in files if file.is_file()]
    return hash_of(files=[sha256_of(file) for file in known]) if known else ""


def _source_hash(spec: DataSpec) -> str:
    """Return a hash of the content of a source."""
    path = expand_user(spec.path)
    if path.exists():
        return content_hash(path)
    dataset: Any = read_rows(spec)
    return dataset._fingerprint


def _size_in_bytes(spec: DataSpec) -> int:
    """Return the approximate size of a source; 0 if it cannot be read."""
    path = expand_user(spec.path)
    if path.is_file():
        return path.stat().st_size * (_COMPRESSION if path.suffix in (".gz", ".parquet") else 1)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    try:
        dataset: Any = read_rows(spec)
    except ValueError:  # `load` reports the error
        return 0
    return dataset.data.nbytes
