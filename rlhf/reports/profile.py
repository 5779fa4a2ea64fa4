"""Build the report's tables of time and throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.evaluation.records import RunRecord
from rlhf.reports.markup import Table, capitalize_acronyms
from rlhf.runs.profiling import STEP_PARTS, WAITING_FOR_ROLLOUTS

# Metrics logged with `profile: true`, and their names on the page.
PROFILE_METRICS = {
    "profile/tokens_per_second": "tokens per second",
    "profile/flop_utilization": "FLOP utilization of the update",
    "profile/padding": "share of padding",
    "profile/shared": "share of tokens in reused prefixes",
    "profile/peak_memory": "peak memory, GiB",
}


def profile_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return the tables of time and of profiles; each cell is the median over the logged steps.

    The first table has the seconds of each part of a step, and the sum of these medians. The second
    has the `PROFILE_METRICS`. A table without data is omitted.
    """
    waits = any(run.series(f"time/{WAITING_FOR_ROLLOUTS}")[1] for run in runs)
    parts = (*STEP_PARTS, WAITING_FOR_ROLLOUTS) if waits else STEP_PARTS
    times = {f"time/{part}": part for part in parts}
    tables = []
    if timed := _metric_medians_by_run(runs, times):
        rows = [[name, sum(filter(None, cells)), *cells] for name, cells in timed]
        columns = ["stage", "seconds a step", *parts]
        tables.append(Table("time", "Time by part of a step (median over steps)", columns, rows))
    if profiled := _metric_medians_by_run(runs, PROFILE_METRICS):
        columns = ["stage", *PROFILE_METRICS.values()]
        rows = [[name, *cells] for name, cells in profiled]
        tables.append(Table("profile", "Profile (median over steps)", columns, rows))
    return tables


def _metric_medians_by_run(
    runs: Sequence[RunRecord], keys: Mapping[str, str]
) -> list[tuple[str, list[float | None]]]:
    """Return (name, medians of the metrics `keys`) for every run that logged any of them."""
    rows = []
    for run in runs:
        series = [run.series(key)[1] for key in keys]
        if any(series):
            cells = [float(np.median(values)) if values else None for values in series]
            rows.append((capitalize_acronyms(run.name), cells))
    return rows
