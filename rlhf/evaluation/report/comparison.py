"""`rlhf report --compare`: several runs on one page, with bands over training seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.evaluation.arms import label_runs
from rlhf.evaluation.records import REFERENCE_POLICIES, RunRecord, read_stages
from rlhf.evaluation.report import results
from rlhf.evaluation.report.charts import Chart, Series, draw
from rlhf.evaluation.report.markup import Cell, Table, esc, named, plural, section
from rlhf.evaluation.report.page import page
from rlhf.evaluation.report.tables import save_tables
from rlhf.evaluation.statistics import Estimate, mean_interval
from rlhf.runs import PLACES, flatten

_FIRST = ("reward/mean", "eval/gold", "eval/return", "policy/kl", "eval/loss", "train/loss")
_IGNORED = ("time/", "tokens/")


def write_comparison_report(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """Write one page on several runs to `path`; its tables lie beside it in `<stem>_tables/`.

    Runs whose paths differ only in a part such as `seed3` are one arm: its curve is the mean over
    training seeds with a 95% t band. Raises UserError when a folder holds no run.
    """
    directories = dict.fromkeys(Path(directory).resolve() for directory in run_dirs)
    runs = [run for directory in directories for run in read_stages(directory)]
    arms: dict[str, list[RunRecord]] = {}
    for run, label in zip(runs, label_runs([r.directory for r in runs]), strict=True):
        arms.setdefault(label, []).append(run)
    metric = results.headline_metric(runs)
    found = results.comparisons(runs, metric) if metric else []
    tables = [results.evaluation_table(runs), results.difference_table(found)]
    tables += [metric_table(arms), config_table(arms)]
    kept = [table for table in tables if table is not None and table.rows]
    target = Path(path)
    save_tables(target.parent / f"{target.stem}_tables", kept)
    judged = [row.arm for c in found[:1] for row in c.rows if row.arm not in REFERENCE_POLICIES]
    names = list(dict.fromkeys(judged))
    body = [_header(names if len(names) > 1 else list(arms), arms)]
    if found:
        body.append(results.verdict_list(found[0]))
        forests = results.score_forests(found[0], results.known_bounds(runs))
        body.append(section("Result", forests, results.difference_forest(found[0])))
    body.append(section("Curves", _curves(arms)))
    body += [section(table.title, table.to_html()) for table in kept]
    body.append(results.notes(found))
    target.write_text(page("Comparison", "\n".join(body)), encoding="utf-8")
    return target


def _header(names: Sequence[str], arms: Mapping[str, Sequence[RunRecord]]) -> str:
    chain = "".join(
        f"<li><b>{esc(named(name))}</b><span>{plural(len(runs), 'run')}</span></li>"
        for name, runs in arms.items()
    )
    title = esc(named(" against ".join(names)))
    return f'<header><h1>{title}</h1><ul class="chain sides">{chain}</ul></header>'


def config_table(arms: Mapping[str, Sequence[RunRecord]]) -> Table:
    """Keys whose values differ between the arms (of the first run each); paths of output aside."""
    flat = {name: flatten(runs[0].config) for name, runs in arms.items()}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    rows: list[list[Cell]] = [
        [key, *(_plain(config.get(key)) for config in flat.values())]
        for key in keys
        if key.split(".")[-1] not in PLACES
        and len({repr(config.get(key)) for config in flat.values()}) > 1
    ]
    return Table("configs", "What was configured differently", ["key", *arms], rows)


def metric_table(arms: Mapping[str, Sequence[RunRecord]]) -> Table:
    """Last value of every metric, averaged over an arm's training seeds."""
    rows: list[list[Cell]] = []
    for key in _keys(arms):
        cells = [_last(runs, key) for runs in arms.values()]
        rows.append([key, *cells])
    return Table("metrics", "Where the metrics ended", ["metric", *arms], rows)


def seed_band(runs: Sequence[RunRecord], key: str) -> tuple[list[float], list[Estimate]]:
    """Steps that all runs of an arm logged, and mean with t interval over the runs at each."""
    by_run = [dict(zip(*run.series(key), strict=True)) for run in runs]
    by_run = [values for values in by_run if values]
    if not by_run:
        return [], []
    steps = sorted(set.intersection(*(set(values) for values in by_run)))
    return steps, [mean_interval(np.array([v[step] for v in by_run])) for step in steps]


def _curves(arms: Mapping[str, Sequence[RunRecord]]) -> str:
    charts = []
    for key in _keys(arms):
        lines = []
        for index, (name, runs) in enumerate(arms.items()):
            steps, band = seed_band(runs, key)
            known = bool(band) and all(e.known for e in band)
            lines.append(
                Series(
                    named(name),
                    steps,
                    [e.value for e in band],
                    colour=f"c{index % 6 + 1}",
                    low=[e.low for e in band] if known else (),
                    high=[e.high for e in band] if known else (),
                )
            )
        if any(line.x for line in lines):
            charts.append(Chart(key, lines))
    panels = "".join(draw(chart) for chart in charts)
    note = '<p class="note">Mean over training seeds; bands are 95% t intervals.</p>'
    return f'{note}<div class="charts">{panels}</div>' if panels else ""


def _keys(arms: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    rows = [row for runs in arms.values() for run in runs for row in run.metrics]
    logged = dict.fromkeys(key for row in rows for key in row)
    keys = [k for k in logged if "/" in k and not k.startswith(_IGNORED)]
    return sorted(keys, key=lambda k: (_FIRST.index(k) if k in _FIRST else len(_FIRST), k))


def _last(runs: Sequence[RunRecord], key: str) -> Estimate | None:
    finals = [values[-1] for run in runs for values in [run.series(key)[1]] if values]
    return mean_interval(finals) if finals else None


def _plain(value: Any) -> str | None:
    return None if value is None else str(value)
