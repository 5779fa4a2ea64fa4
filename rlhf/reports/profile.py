"""Where the seconds of a run went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.evaluation.records import RunRecord
from rlhf.reports.markup import Table, named
from rlhf.runs.profiling import PARTS

# Logged with `profile: true`, and how the page calls them.
EXTRA = {
    "profile/tokens_per_second": "tokens per second",
    "profile/flop_utilisation": "FLOP utilisation of the update",
    "profile/padding": "share of padding",
    "profile/shared": "share of shared tokens",
    "profile/peak_memory": "peak memory, GiB",
}


def profile_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Seconds of an ordinary step by part for every run that told; one more where profiled."""
    times = {f"time/{part}": part for part in PARTS}
    tables = []
    if timed := _by_run(runs, times):
        rows = [[name, sum(filter(None, cells)), *cells] for name, cells in timed]
        columns = ["stage", "seconds a step", *PARTS]
        tables.append(Table("time", "Where the time went (median of steps)", columns, rows))
    if told := _by_run(runs, EXTRA):
        columns = ["stage", *EXTRA.values()]
        rows = [[name, *cells] for name, cells in told]
        tables.append(Table("profile", "Profile (median of steps)", columns, rows))
    return tables


def _by_run(
    runs: Sequence[RunRecord], keys: Mapping[str, str]
) -> list[tuple[str, list[float | None]]]:
    """Name and medians of every run that logged any of the keys."""
    found = []
    for run in runs:
        series = [run.series(key)[1] for key in keys]
        if any(series):
            cells = [float(np.median(values)) if values else None for values in series]
            found.append((named(run.name), cells))
    return found
