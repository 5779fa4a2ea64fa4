"""Load data sets into canonical rows, mix them, and count every row that falls out."""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.conversation import RowDropped
from rlhf.data.files import Row, read_rows
from rlhf.data.formats import convert, find_columns
from rlhf.data.spec import FIELDS, KINDS, DataSpec, Kind
from rlhf.errors import UserError

PROGRESS_FROM = 5_000
"""Rows from which on a progress bar is worth a line."""


@dataclass(frozen=True)
class Loaded:
    """Canonical rows of one kind, with an account of what did not become one.

    `total == len(rows) + sum(dropped.values()) + unused`.
    """

    rows: list[dict[str, Any]]
    """Shuffled canonical rows; every message list is a Conversation.

    sft: prompt, completion. preference: prompt, chosen, rejected, perhaps margin. label: prompt,
    completion, label (bool). prompt: prompt. text: text. rated: text, or prompt and completion.
    classification: the same with label (number). ranking: prompt, replies (message lists, best
    first). steps: prompt, steps (texts), labels (0, 1 or None).
    Every row also has `source` (the path of its spec) and the columns asked for with `keep`.
    """
    dropped: dict[str, int]
    """Reason -> rows that could not be used, the commonest first."""
    total: int
    """Rows in all sources."""
    unused: int = 0
    """Rows left alone: beyond a limit, or beyond a source's share of the mixture."""
    sources: dict[str, int] = field(default_factory=dict)
    """Path -> rows it contributes."""
    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason -> the first row of its source that was dropped for it, as "path, row 17"."""

    def summary(self) -> str:
        """One line: rows kept, dropped by reason, unused, and the size of each source."""
        line = f"{len(self.rows):,} of {self.total:,} rows"
        if self.dropped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
            line += f"; dropped {sum(self.dropped.values()):,}: {reasons}"
        if self.unused:
            line += f"; {self.unused:,} unused (limit or mixture weights)"
        if len(self.sources) > 1:
            line += "; " + ", ".join(f"{path} {count:,}" for path, count in self.sources.items())
        return line


def load(
    specs: DataSpec | Sequence[DataSpec], kind: Kind, *, seed: int, keep: Iterable[str] = ()
) -> Loaded:
    """Read, convert, mix and shuffle one or several data sets.

    Args:
        specs: one source or several. With weights, the mixture is the largest that has these shares
            and uses no row twice; without, all rows of all sources.
        kind: which canonical rows to make, see `Loaded.rows`.
        seed: of the shuffle; the same seed gives the same rows in the same order.
        keep: further columns to carry along under their own names (None where a row lacks one).

    Raises:
        UserError: nothing at a path, broken content, columns that cannot be understood, or no
            usable row at all.
    """
    specs = [specs] if isinstance(specs, DataSpec) else list(specs)
    _check(specs, kind)
    keep = tuple(keep)
    parts = [_load_one(spec, kind, seed=f"{seed}/{i}", keep=keep) for i, spec in enumerate(specs)]
    sizes = mixture_sizes([len(part.rows) for part in parts], [spec.weight for spec in specs])
    rows = [row for part, size in zip(parts, sizes, strict=True) for row in part.rows[:size]]
    if len(parts) > 1:
        random.Random(seed).shuffle(rows)
    dropped, sources = Counter(), Counter()
    first_dropped: dict[str, str] = {}
    for part, spec, size in zip(parts, specs, sizes, strict=True):
        dropped.update(part.dropped)
        first_dropped = part.first_dropped | first_dropped
        sources[spec.path] += size
    total = sum(part.total for part in parts)
    return Loaded(
        rows=rows,
        dropped=dict(dropped.most_common()),
        total=total,
        unused=total - len(rows) - dropped.total(),
        sources=dict(sources),
        first_dropped=first_dropped,
    )


def mixture_sizes(available: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Rows to take from each source: the largest mixture with these shares and no row twice.

    The source that is scarcest for its share is used up and the others follow; no source falls to
    zero. Without any weight every row of every source is taken.
    """
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return list(available)
    if len(shares) != len(weights):
        raise UserError("data.weight is set for some sources only: set it for all or for none")
    scale = min(count / share for count, share in zip(available, shares, strict=True))
    return [
        min(count, max(1, round(scale * share)))
        for count, share in zip(available, shares, strict=True)
    ]


def _check(specs: Sequence[DataSpec], kind: str) -> None:
    if not specs:
        raise UserError("no data source given: data needs at least one path")
    if kind not in KINDS:
        raise UserError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _load_one(spec: DataSpec, kind: Kind, *, seed: str, keep: tuple[str, ...]) -> Loaded:
    table = read_rows(spec)
    if len(table) == 0:
        raise UserError(f"{spec.path}: the data set is empty")
    present = _columns_of(table)
    columns = find_columns(kind, present, mapping=spec.columns, source=spec.path)
    _check_keep(keep, present, kind=kind, source=spec.path)
    order = list(range(len(table)))
    random.Random(seed).shuffle(order)
    rows: list[dict[str, Any]] = []
    dropped: dict[str, list[int]] = defaultdict(list)
    for index in _with_progress(order, spec.path):
        if len(rows) == spec.limit:
            break
        row = table[index]
        try:
            made = convert(row, kind, columns=columns, system=spec.system)
        except RowDropped as reason:
            dropped[str(reason)].append(index)
            continue
        rows.append(made | {"source": spec.path} | {name: row.get(name) for name in keep})
    counts = Counter({reason: len(where) for reason, where in dropped.items()})
    if not rows:
        raise UserError(_nothing_left(spec.path, counts, columns))
    return Loaded(
        rows=rows,
        dropped=dict(counts),
        total=len(table),
        unused=len(table) - len(rows) - counts.total(),
        first_dropped={r: f"{spec.path}, row {min(at) + 1}" for r, at in dropped.items()},
    )


def _columns_of(table: Sequence[Row]) -> set[str]:
    """Column names: a hub table states them, rows of a file may each have their own."""
    if isinstance(table, list):
        return {name for row in table for name in row}
    return set(table[0])


def _check_keep(keep: tuple[str, ...], present: set[str], *, kind: Kind, source: str) -> None:
    ours = {*FIELDS, "source"} - {"input", "messages"}
    for name in keep:
        if name in ours:
            raise UserError(f"{source}: column {name!r} cannot be kept, {kind} rows use that name")
        if name not in present:
            raise UserError(
                f"{source}: no column {name!r} to keep; columns found: {', '.join(sorted(present))}"
            )


def _nothing_left(path: str, dropped: Counter[str], columns: dict[str, str]) -> str:
    if list(dropped) == ["chosen equals rejected"]:
        return (
            f"{path}: all {dropped.total():,} pairs are identical, chosen equals rejected in each"
        )
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
    read = ", ".join(f"{field} from {column!r}" for field, column in columns.items())
    return f"{path}: no usable row ({reasons}); read {read}, see data.columns"


def _with_progress(order: list[int], path: str) -> Iterable[int]:
    if len(order) <= PROGRESS_FROM or not sys.stderr.isatty():
        return order
    from rich.console import Console
    from rich.progress import track

    return track(order, f"Reading {path}", console=Console(stderr=True), transient=True)
