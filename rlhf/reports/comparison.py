"""`rlhf report A B`: several runs on one page, with bands over training seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf.evaluation.compare import Comparison, headline_metric
from rlhf.evaluation.records import REFERENCE_POLICIES, RunRecord, read_stages
from rlhf.evaluation.run_groups import label_runs, measured
from rlhf.reports import results, transcripts
from rlhf.reports.charts import Chart, Series, draw, short
from rlhf.reports.markup import Cell, Table, esc, named, plural, section
from rlhf.reports.page import page
from rlhf.reports.tables import save_tables
from rlhf.runs.directory import PLACES, flatten
from rlhf.stats import Interval, interval

_FIRST = ("reward/mean", "eval/gold", "eval/return", "policy/kl", "eval/loss", "train/loss")
_IGNORED = ("time/", "tokens/")


def write_comparison_report(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """Write one page on several runs to `path`; its tables lie beside it in `<stem>_tables/`.

    Runs whose paths differ only in a part such as `seed3` are one arm: its curve is the mean over
    training seeds with a 95% t band. Raises UserError when a folder holds no run.
    """
    directories = dict.fromkeys(Path(directory).resolve() for directory in run_dirs)
    runs = [run for directory in directories for run in read_stages(directory)]
    arms = _arms(runs)
    metric = headline_metric(runs)
    found = results.comparisons(runs, metric) if metric else []
    tables = [results.evaluation_table(runs, by_arm=True), results.difference_table(found)]
    tables += [metric_table(arms), config_table(arms)]
    kept = [table for table in tables if table is not None and table.rows]
    target = Path(path)
    save_tables(target.parent / f"{target.stem}_tables", kept)
    sides = _sides(runs, arms)
    colours = _colours(sides, arms)
    body = [_header(_title(found[:1], sides), sides, colours)]
    if found:
        body.append(results.verdict_list(found[0]))
        forests = results.score_forests(found[0], results.known_bounds(runs), colours)
        body.append(section("Result", forests, results.difference_forest(found[0])))
    body.append(section("Curves", _curves(arms, colours)))
    body += [section(table.title, table.to_html()) for table in kept]
    body.append(results.notes(found))
    body.append(section("Transcripts", _transcripts(runs, found[:1])))
    target.write_text(page("Comparison", "\n".join(body)), encoding="utf-8")
    return target


def _arms(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs by arm; where some trained, those that only measured others are no arms."""
    arms: dict[str, list[RunRecord]] = {}
    for run, label in zip(runs, label_runs([r.directory for r in runs]), strict=True):
        arms.setdefault(label, []).append(run)
    trained = {name: found for name, found in arms.items() if not _measures_others(found[0])}
    return trained or arms


def _measures_others(run: RunRecord) -> bool:
    """Whether a run is one of `rlhf evaluate`: its policies are the arms, not itself."""
    policies = {evaluation.describe("policy") for evaluation in run.evaluations}
    return "policies" in run.config or (bool(policies) and policies <= {*REFERENCE_POLICIES})


def _sides(runs: Sequence[RunRecord], arms: Mapping[str, Sequence[RunRecord]]) -> dict[str, int]:
    """Arm -> how many runs of it stand here: what was measured first, then what only trained."""
    seeds: dict[str, set[int]] = {}
    for item in measured(runs):
        if not item.is_reference:
            seeds.setdefault(item.arm, set()).add(item.seed)
    counts = {name: len(found) for name, found in seeds.items()}
    trained = {name: len(found) for name, found in arms.items() if not _measures_others(found[0])}
    return counts | trained or {name: len(found) for name, found in arms.items()}


def _colours(sides: Mapping[str, int], arms: Mapping[str, Sequence[RunRecord]]) -> dict[str, str]:
    """Arm -> class of its colour; grey for an arm measured here whose training is not."""
    known = [name for name in sides if name in arms] or list(sides)
    tones = {name: f"c{index % 6 + 1}" for index, name in enumerate(known)}
    return {name: tones.get(name, "ref") for name in (*sides, *arms)}


def _title(found: Sequence[Comparison], sides: Mapping[str, int]) -> str:
    judged = [row.arm for c in found for row in c.rows if row.arm not in REFERENCE_POLICIES]
    names = list(dict.fromkeys(judged))
    return " against ".join(names if len(names) > 1 else sides)


def _header(title: str, sides: Mapping[str, int], colours: Mapping[str, str]) -> str:
    chain = "".join(
        f'<li class="{colours[name]}"><b>{esc(named(name))}</b>'
        f"<span>{plural(count, 'run')}</span></li>"
        for name, count in sides.items()
    )
    return f'<header><h1>{esc(named(title))}</h1><ul class="chain sides">{chain}</ul></header>'


def _transcripts(runs: Sequence[RunRecord], found: Sequence[Comparison]) -> str:
    cards = "".join(transcripts.across_arms(runs, comparison) for comparison in found)
    if not cards:
        return ""
    which = '<p class="note">Where arms have several training seeds, of the first common one.</p>'
    return _fold("Held-out episodes of the same seed under every arm, side by side", which + cards)


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


def seed_band(runs: Sequence[RunRecord], key: str) -> tuple[list[float], list[Interval]]:
    """Steps that all runs of an arm logged, and mean with t interval over the runs at each."""
    by_run = [dict(zip(*run.series(key), strict=True)) for run in runs]
    by_run = [values for values in by_run if values]
    if not by_run:
        return [], []
    steps = sorted(set.intersection(*(set(values) for values in by_run)))
    return steps, [interval([v[step] for v in by_run], kind="mean") for step in steps]


def _curves(arms: Mapping[str, Sequence[RunRecord]], colours: Mapping[str, str]) -> str:
    """Panels; those of one arm only are folded, and what never moved is told in words."""
    shared, alone, constant = [], [], []
    for key in _keys(arms):
        lines = [_line(name, runs, key, colours[name]) for name, runs in arms.items()]
        lines = [line for line in lines if line.x]
        if lines and all(_never_moved(line) for line in lines):
            constant.append(f"{key} {_level(lines)}")
        elif lines:
            (shared if len(lines) > 1 or key in _FIRST else alone).append(Chart(key, lines))
    note = '<p class="note">Mean over training seeds; bands are 95% t intervals.</p>'
    parts = [note + _panels(shared)] if shared else []
    if alone:
        words = f"{plural(len(alone), 'metric')} of one arm only"
        parts.append(_fold(words, _panels(alone)))
    if constant:
        parts.append(f'<p class="note">Constant: {esc("; ".join(constant))}.</p>')
    return "".join(parts)


def _fold(words: str, body: str) -> str:
    return f'<details class="fold"><summary>{words}</summary>{body}</details>'


def _panels(charts: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(map(draw, charts))}</div>'


def _line(name: str, runs: Sequence[RunRecord], key: str, colour: str) -> Series:
    steps, band = seed_band(runs, key)
    known = bool(band) and all(e.known for e in band)
    return Series(
        named(name),
        steps,
        [e.value for e in band],
        colour,
        low=[e.low for e in band] if known else (),
        high=[e.high for e in band] if known else (),
    )


def _never_moved(line: Series) -> bool:
    """Whether all runs of an arm logged one value from first to last."""
    values = [*line.y, *line.low, *line.high]
    # The mean of five equal values may differ from them in its last digit.
    return len(line.x) > 1 and math.isclose(min(values), max(values), abs_tol=1e-12)


def _level(lines: Sequence[Series]) -> str:
    """`0.01`, or what each arm had: `0.01 (PPO), 0.05 (RLOO)`."""
    levels = [short(line.y[0]) for line in lines]
    if len(set(levels)) == 1:
        return levels[0]
    return ", ".join(f"{level} ({line.name})" for level, line in zip(levels, lines, strict=True))


def _keys(arms: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    rows = [row for runs in arms.values() for run in runs for row in run.metrics]
    logged = dict.fromkeys(key for row in rows for key in row)
    keys = [k for k in logged if "/" in k and not k.startswith(_IGNORED)]
    return sorted(keys, key=lambda k: (_FIRST.index(k) if k in _FIRST else len(_FIRST), k))


def _last(runs: Sequence[RunRecord], key: str) -> Interval | None:
    finals = [values[-1] for run in runs for values in [run.series(key)[1]] if values]
    return interval(finals, kind="mean") if finals else None


def _plain(value: Any) -> str | None:
    """A configured value as YAML on one line."""
    if value is None or (isinstance(value, str) and value.isprintable() and value.strip()):
        return value
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**20
    )
    return text.removesuffix("\n").removesuffix("\n...")
