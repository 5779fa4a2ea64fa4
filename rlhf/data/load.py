"""Load datasets as canonical rows, mix them, and count the dropped rows."""

from __future__ import annotations

import logging
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.common.text import count_text
from rlhf.config.data import DATA_KINDS, DataSpec, Kind
from rlhf.data.files import read_rows
from rlhf.data.reader import TableReader
from rlhf.errors import UserError

log = logging.getLogger(__name__)

PROGRESS_BAR_MIN_ROWS = 5_000
"""A progress bar is shown for more than this number of rows."""


@dataclass(frozen=True)
class LoadedRows:
    """Canonical rows of one kind, with the numbers of dropped and unused rows.

    `total` is `len(rows) + sum(dropped.values()) + unused`.
    """

    rows: Sequence[dict[str, Any]]
    """Canonical rows, shuffled if there is a seed: a list, or rows that are read from a file. Every
    message list is a Conversation. The keys of each kind are:

    - sft: prompt, completion
    - preference: prompt, chosen, rejected, and optionally margin
    - label: prompt, completion, label (bool)
    - prompt: prompt
    - text: text
    - rated: text, or prompt and completion
    - classification: the keys of rated, and label (number)
    - ranking: prompt, replies (message lists, best first)
    - steps: prompt, steps (texts), labels (0, 1 or None)

    Rows with a prompt can also have tools. Every row has `source` (the path of its spec) and the
    columns of `keep`. Rows of people's labels can have `strengths` or `scale`, see
    `rlhf.data.labels.RANGE_COLUMNS`.
    """
    dropped: dict[str, int]
    """Reason -> number of dropped rows, the most common first."""
    total: int
    """Number of rows of all sources. A row that gives several canonical rows counts as several."""
    unused: int = 0
    """Number of rows that were not used because of a limit or of the mixture weights."""
    sources: dict[str, int] = field(default_factory=dict)
    """Path of a source -> number of its rows in `rows`."""
    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason -> the first row that was dropped for this reason, as "path, row 17"."""
    unused_columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Path of a source -> columns that were not read."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Description of an ignored part of a cell -> number of rows."""
    schemas: dict[str, str] = field(default_factory=dict)
    """Path of a source -> name of its public schema, for sources that have one."""
    for_rewards: bool = False
    """Whether rewards read the rows, so that `reward_columns` can name further columns."""

    def log_summary(self, data_name: str) -> None:
        """Log `summary`, as a warning if rows were dropped, so that Python programs show it too."""
        level = logging.WARNING if self.dropped else logging.INFO
        log.log(level, "%s: %s", data_name, self.summary())

    def summary(self) -> str:
        """Return one line: the numbers of used, dropped and unused rows, and `reading_notes`."""
        line = f"{len(self.rows):,} of {self.total:,} rows"
        if self.dropped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
            line += f"; dropped {sum(self.dropped.values()):,}: {reasons}"
        if self.unused:
            line += f"; {self.unused:,} unused (limit or mixture weights)"
        if len(self.sources) > 1:
            line += "; " + ", ".join(f"{path} {count:,}" for path, count in self.sources.items())
        return "; ".join([line, *self.reading_notes()])

    def counts(self) -> dict[str, Any]:
        """Return the numbers of rows as plain data, for the record of a run."""
        return {
            "rows": len(self.rows),
            "total": self.total,
            "dropped": self.dropped,
            "unused": self.unused,
            "sources": self.sources,
            "schemas": self.schemas,
        }

    def reading_notes(self) -> list[str]:
        """Return lines about the schemas, the unused columns and the ignored parts of cells."""
        several = len(self.sources) > 1

        def join_with_paths(text_by_path: dict[str, str]) -> str:
            return ", ".join(f"{t} ({path})" if several else t for path, t in text_by_path.items())

        lines = []
        if self.schemas:
            lines.append(f"read as {join_with_paths(self.schemas)}")
        if self.unused_columns:
            names = {path: ", ".join(columns) for path, columns in self.unused_columns.items()}
            advice = (
                " (reward_columns: [NAME, ...] passes columns to rewards)"
                if self.for_rewards
                else ""
            )
            lines.append(f"columns not used: {join_with_paths(names)}{advice}")
        if self.ignored:
            counts = (
                f"{what} in {count_text(count, 'row')}" for what, count in self.ignored.items()
            )
            lines.append(f"ignored: {', '.join(counts)}")
        return lines


def load(
    specs: DataSpec | Sequence[DataSpec],
    kind: Kind,
    *,
    seed: int | None,
    keep: Iterable[str] = (),
    with_answer_and_tests: bool = False,
) -> LoadedRows:
    """Read, convert, mix and shuffle one or several datasets.

    Args:
        specs: One or several sources. If they have weights, the result is the largest mixture with
            these proportions that uses no row twice. Otherwise, the result has all rows.
        kind: Kind of canonical rows, see `LoadedRows.rows`.
        seed: Seed of the shuffle. The same seed gives the same rows in the same order. If it is
            None, the rows are not shuffled.
        keep: Names of additional columns to include in the rows. The value is None in a row that
            does not have the column.
        with_answer_and_tests: Whether to add the answer and tests columns and the reward columns of
            the sources to the last user message, for rewards. They are always added to rows of kind
            "prompt".

    Raises:
        UserError: A path does not exist, its content is malformed, its columns cannot be assigned
            to fields, no row of a source is usable, or an argument is not valid.
    """
    specs = checked_specs(specs, kind)
    options = {"keep": tuple(keep), "with_answer_and_tests": with_answer_and_tests}
    readers = [
        _read_source(spec, kind, seed=source_seed(seed, i), **options)
        for i, spec in enumerate(specs)
    ]
    sizes = mixture_sizes([len(reader.rows) for reader in readers], [s.weight for s in specs])
    rows = [row for reader, size in zip(readers, sizes, strict=True) for row in reader.rows[:size]]
    if len(readers) > 1 and seed is not None:
        random.Random(seed).shuffle(rows)
    return combine_source_counts(rows, [_counts_of(reader) for reader in readers], sizes)


def checked_specs(specs: DataSpec | Sequence[DataSpec], kind: Kind) -> list[DataSpec]:
    """Return the sources as a list, after checks.

    Raises:
        UserError: There is no source, the kind does not exist, or a source is streamed.
    """
    specs = [specs] if isinstance(specs, DataSpec) else list(specs)
    if not specs:
        raise UserError("no data source given: data needs at least one path")
    if kind not in DATA_KINDS:
        raise UserError(f"kind must be one of {', '.join(DATA_KINDS)}, got {kind!r}")
    if any(spec.streaming for spec in specs):
        raise UserError(
            "data.streaming: only the training data of rlhf sft with the native engine can be "
            "streamed; remove streaming"
        )
    return specs


def source_seed(seed: int | None, index: int) -> str | None:
    """Return the seed of the shuffle of the source with this index; None without a `seed`."""
    return None if seed is None else f"{seed}/{index}"


@dataclass(frozen=True)
class SourceCounts:
    """Numbers of the rows of one source, see `LoadedRows`."""

    path: str
    total: int
    dropped: Counter[str]
    first_dropped: dict[str, int]
    """Reason -> index of the first row of the table that was dropped for this reason."""
    ignored: Counter[str]
    unused_columns: tuple[str, ...]
    schema: str | None
    for_rewards: bool = False


def _counts_of(reader: TableReader) -> SourceCounts:
    return SourceCounts(
        path=reader.spec.path,
        total=reader.total,
        dropped=reader.num_dropped,
        first_dropped={reason: min(indices) for reason, indices in reader.dropped.items()},
        ignored=reader.ignored,
        unused_columns=reader.unused_columns,
        schema=reader.schema.name if reader.schema else None,
        for_rewards=reader.with_answer_and_tests,
    )


def combine_source_counts(
    rows: Sequence[dict[str, Any]], counts: Sequence[SourceCounts], sizes: Sequence[int]
) -> LoadedRows:
    """Return mixed rows with the numbers of all sources.

    Args:
        rows: Rows of the mixture.
        counts: Numbers of the rows of each source.
        sizes: Number of rows of each source in the mixture.
    """
    dropped, sources, ignored, first_dropped = Counter(), Counter(), Counter(), {}
    for source, size in zip(counts, sizes, strict=True):
        dropped.update(source.dropped)
        ignored.update(source.ignored)
        sources[source.path] += size
        first_dropped = {
            reason: f"{source.path}, row {index + 1}"
            for reason, index in source.first_dropped.items()
        } | first_dropped
    return LoadedRows(
        rows=rows,
        dropped=dict(dropped.most_common()),
        total=(total := sum(source.total for source in counts)),
        unused=total - len(rows) - dropped.total(),
        sources=dict(sources),
        first_dropped=first_dropped,
        unused_columns={s.path: s.unused_columns for s in counts if s.unused_columns},
        ignored=dict(ignored.most_common()),
        schemas={s.path: s.schema for s in counts if s.schema},
        for_rewards=any(source.for_rewards for source in counts),
    )


def load_and_log(
    specs: Sequence[DataSpec],
    kind: Kind,
    *,
    data_name: str,
    seed: int,
    keep: Iterable[str] = (),
    counts: dict[str, Any] | None = None,
    with_answer_and_tests: bool = False,
) -> list[dict[str, Any]]:
    """Load datasets, log a summary that begins with `data_name`, and return the rows.

    If `specs` is empty, the result is [] and nothing is logged. If `counts` is given, the numbers
    of rows are added to it under the key `data_name`.

    Raises:
        UserError: As in `load`.
    """
    if not specs:
        return []
    loaded = load(specs, kind, seed=seed, keep=keep, with_answer_and_tests=with_answer_and_tests)
    loaded.log_summary(data_name)
    if counts is not None:
        counts[data_name] = loaded.counts()
    return list(loaded.rows)


def mixture_sizes(row_counts: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Return the number of rows of each source in the largest mixture with these weights.

    The mixture contains all rows of the source that has the fewest rows relative to its weight. It
    contains at least one row of every source. Without weights, it contains all rows.

    Raises:
        UserError: Only some of the sources have a weight.
    """
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return list(row_counts)
    if len(shares) != len(weights):
        raise UserError("data.weight is set for some sources only: set it for all or for none")
    scale = min(count / share for count, share in zip(row_counts, shares, strict=True))
    return [
        min(count, max(1, round(scale * share)))
        for count, share in zip(row_counts, shares, strict=True)
    ]


def _read_source(
    spec: DataSpec,
    kind: Kind,
    *,
    seed: str | None,
    keep: tuple[str, ...],
    with_answer_and_tests: bool,
) -> TableReader:
    """Read a source up to its limit, in a random order, or in the file's order if `seed` is None.

    Raises:
        UserError: As in `load`.
    """
    reader = TableReader(
        read_rows(spec), kind, spec, keep=keep, with_answer_and_tests=with_answer_and_tests
    )
    order = list(range(len(reader.table)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    reader.read(_with_progress(order, spec.path))
    # A schema can make several rows from one row of the table, which would otherwise be adjacent.
    if reader.schema is not None and seed is not None:
        random.Random(f"{seed}/rows").shuffle(reader.rows)
    if not reader.rows:
        columns = reader.layouts[0].columns if reader.layouts else {}
        raise UserError(no_rows_message(_counts_of(reader), columns))
    return reader


def no_rows_message(source: SourceCounts, columns: Mapping[str, str]) -> str:
    """Return the message for a source whose rows were all dropped.

    Args:
        source: Numbers of the rows of the source.
        columns: Field -> column of the first layout, if the source has no public schema.
    """
    path, dropped = source.path, source.dropped
    if list(dropped) == ["chosen equals rejected"]:
        return (
            f"{path}: all {dropped.total():,} pairs are identical, chosen equals rejected in each"
        )
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
    reasons = reasons or "no row contains one of this kind"
    if source.schema is not None:
        return f"{path}: no usable row ({reasons}); read as {source.schema}"
    read = ", ".join(f"{field} from {column!r}" for field, column in columns.items())
    return f"{path}: no usable row ({reasons}); read {read}, see data.columns"


def _with_progress(order: list[int], path: str) -> Iterable[int]:
    if len(order) <= PROGRESS_BAR_MIN_ROWS or not sys.stderr.isatty():
        return order
    from rich.console import Console
    from rich.progress import track

    return track(order, f"Reading {path}", console=Console(stderr=True), transient=True)
