"""`rlhf report A B`: write one page for several runs, with intervals over training seeds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf.common.numbers import short_number
from rlhf.common.text import count_text
from rlhf.evaluation.compare import Comparison, headline_metric
from rlhf.evaluation.records import REFERENCE_POLICIES, RunRecord, read_runs
from rlhf.evaluation.reward_accuracy import as_reward_accuracy_runs
from rlhf.evaluation.run_groups import method_evaluations, method_names
from rlhf.reports import results, transcripts
from rlhf.reports.charts import Chart, Series, charts_html
from rlhf.reports.markup import (
    Cell,
    Table,
    capital_acronyms_html,
    capitalize_acronyms,
    esc,
    section_html,
    sentence_html,
)
from rlhf.reports.page import check_page_path, page_html, write_page
from rlhf.reports.rewards import reward_reports_html
from rlhf.reports.tables import save_tables_beside_other_files
from rlhf.runs.changes import DIRECTORY_KEYS
from rlhf.runs.directory import flatten_keys
from rlhf.stats import Interval, interval

_FIRST_METRICS = ("reward/mean", "eval/gold", "eval/return", "policy/kl", "eval/loss", "train/loss")
_IGNORED_PREFIXES = ("time/", "tokens/")


def write_comparison_report(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """Write one page for several runs to `path`, and its tables to `<stem>_tables/` next to it.

    Runs whose paths differ only in a part such as `seed3` are runs of one method with different
    training seeds. The curve of such a method is the mean over seeds, with 95% intervals as a band.

    Returns:
        The path of the page.

    Raises:
        UserError: A directory contains no run, or the page or a table would replace a file of the
            user.
    """
    target = Path(path)
    check_page_path(target)
    directories = dict.fromkeys(Path(os.path.realpath(directory)) for directory in run_dirs)
    runs = [run for directory in directories for run in read_runs(directory)]
    runs_by_method = _runs_by_method(runs)
    rewards = as_reward_accuracy_runs(runs)
    compared = rewards.runs if rewards else runs
    metric = headline_metric(compared)
    comparisons = results.compare_by_each_metric(compared, metric) if metric else []
    tables = [
        results.evaluation_table(compared, label_by_method=True),
        results.difference_table(comparisons),
    ]
    tables += [final_metric_table(runs_by_method), config_difference_table(runs_by_method)]
    filled = [table for table in tables if table.rows]
    save_tables_beside_other_files(target.parent / f"{target.stem}_tables", filled)
    counts = _run_counts(runs, runs_by_method)
    colors = _method_color_classes(counts, runs_by_method)
    first = comparisons[0] if comparisons else None
    body = [_header_html(_page_title(first, counts), counts, colors)]
    if first:
        body.append(results.verdict_list_html(first))
        forests = results.score_plots_html(
            first, results.reference_returns_by_environment(runs), colors
        )
        body.append(section_html("Result", forests, results.difference_plots_html(first)))
    body.append(section_html("Reward models", reward_reports_html(runs, links=False)))
    body.append(section_html("Curves", _metric_charts_html(runs_by_method, colors)))
    body += [section_html(table.title, table.to_html()) for table in filled]
    body.append(results.notes_html(comparisons))
    if rewards:
        body += [f'<p class="note">{sentence_html(note)}.</p>' for note in rewards.notes]
    body.append(section_html("Transcripts", _transcripts_html(runs, first)))
    write_page(target, page_html("Comparison", "\n".join(body)))
    return target


def _runs_by_method(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group runs by method; runs of `rlhf evaluate` are omitted if there are training runs."""
    runs_by_method: dict[str, list[RunRecord]] = {}
    for run, label in zip(runs, method_names([r.directory for r in runs]), strict=True):
        runs_by_method.setdefault(label, []).append(run)
    trained = {
        name: group
        for name, group in runs_by_method.items()
        if not _evaluates_listed_policies(group[0])
    }
    return trained or runs_by_method


def _evaluates_listed_policies(run: RunRecord) -> bool:
    """Return whether a run of `rlhf evaluate` evaluates policies that its configuration lists.

    This includes runs that evaluate only policies without training. The methods on the page are
    then these policies, not the run.
    """
    evaluations = run.evaluations
    return "policies" in run.config or (
        bool(evaluations) and all(e.has_untrained_policy for e in evaluations)
    )


def _run_counts(
    runs: Sequence[RunRecord], runs_by_method: Mapping[str, Sequence[RunRecord]]
) -> dict[str, int]:
    """Return the number of runs of each method; methods with evaluations come first.

    If the training runs of a method are not on the page, the result is the number of its distinct
    training seeds.
    """
    seeds: dict[str, set[int]] = {}
    for item in method_evaluations(runs):
        if not item.has_untrained_policy:
            seeds.setdefault(item.method, set()).add(item.seed)
    evaluated = {name: len(numbers) for name, numbers in seeds.items()}
    counts = {name: len(group) for name, group in runs_by_method.items()}
    trained = {
        name: counts[name]
        for name in runs_by_method
        if not _evaluates_listed_policies(runs_by_method[name][0])
    }
    return evaluated | trained or counts


def _method_color_classes(
    counts: Mapping[str, int], runs_by_method: Mapping[str, Sequence[RunRecord]]
) -> dict[str, str]:
    """Return the CSS color class of each method.

    Methods whose training runs are not on the page are gray, if other training runs are on it.
    """
    known = [name for name in counts if name in runs_by_method] or list(counts)
    tones = {name: f"c{index % 6 + 1}" for index, name in enumerate(known)}
    return {name: tones.get(name, "ref") for name in (*counts, *runs_by_method)}


def _page_title(comparison: Comparison | None, counts: Mapping[str, int]) -> str:
    """Return the names of the compared methods, or of all methods, joined by "against"."""
    compared = [row.method for row in comparison.rows] if comparison else []
    names = [name for name in dict.fromkeys(compared) if name not in REFERENCE_POLICIES]
    return " against ".join(names if len(names) > 1 else counts)


def _header_html(title: str, counts: Mapping[str, int], colors: Mapping[str, str]) -> str:
    runs = {name: count_text(count, "run") for name, count in counts.items()}
    return (
        f"<header><h1>{capital_acronyms_html(title)}</h1>{method_tiles_html(runs, colors)}</header>"
    )


def method_tiles_html(facts: Mapping[str, str], colors: Mapping[str, str]) -> str:
    """Return a tile for each method as HTML, with its color, its name and the text of `facts`."""
    tiles = "".join(
        f'<li class="{colors[name]}"><b>{capital_acronyms_html(name)}</b>'
        f"<span>{esc(fact)}</span></li>"
        for name, fact in facts.items()
    )
    return f'<ul class="chain sides">{tiles}</ul>'


def _transcripts_html(runs: Sequence[RunRecord], comparison: Comparison | None) -> str:
    """Return collapsed HTML with episodes of the same evaluation seeds for every method."""
    cards = transcripts.methods_side_by_side_html(runs, comparison) if comparison else ""
    if not cards:
        return ""
    title = "Held-out episodes of the same seed for every method, side by side"
    note = (
        '<p class="note">The episodes are those of the smallest training seed that all methods '
        "have, or those of each method's first seed if there is no common seed.</p>"
    )
    return _collapsible_html(title, note + cards)


def config_difference_table(runs_by_method: Mapping[str, Sequence[RunRecord]]) -> Table:
    """Return a table of the configuration keys that differ between the methods' first runs.

    Keys of output directories are omitted.
    """
    flat = {name: flatten_keys(runs[0].config) for name, runs in runs_by_method.items()}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    rows: list[list[Cell]] = [
        [key, *(_one_line_yaml(config.get(key)) for config in flat.values())]
        for key in keys
        if key.split(".")[-1] not in DIRECTORY_KEYS
        and len({repr(config.get(key)) for config in flat.values()}) > 1
    ]
    return Table("configs", "Configuration differences", ["key", *runs_by_method], rows)


def final_metric_table(runs_by_method: Mapping[str, Sequence[RunRecord]]) -> Table:
    """Return a table of the last value of every metric, as the mean over training seeds."""
    rows = [
        [key, *(_mean_last_value(runs, key) for runs in runs_by_method.values())]
        for key in _shown_metric_names(runs_by_method)
    ]
    return Table("metrics", "Final metrics", ["metric", *runs_by_method], rows)


def mean_metric_curve_over_runs(
    runs: Sequence[RunRecord], key: str
) -> tuple[list[float], list[Interval]]:
    """Return the mean of a metric over runs, with its interval, at each common step.

    Returns:
        The steps that all runs with this metric logged, and the estimates at these steps.
    """
    by_run = [dict(zip(*run.series(key), strict=True)) for run in runs]
    by_run = [values for values in by_run if values]
    if not by_run:
        return [], []
    steps = sorted(set.intersection(*(set(values) for values in by_run)))
    return steps, [interval([v[step] for v in by_run], kind="mean") for step in steps]


def _metric_charts_html(
    runs_by_method: Mapping[str, Sequence[RunRecord]], colors: Mapping[str, str]
) -> str:
    """Return the charts of all metrics as HTML.

    Charts of metrics that only one method logged are collapsed, except for those in
    `_FIRST_METRICS`. Constant metrics are listed as text.
    """
    shared, alone, constant = [], [], []
    for key in _shown_metric_names(runs_by_method):
        bands = {
            name: mean_metric_curve_over_runs(runs, key) for name, runs in runs_by_method.items()
        }
        lines = [
            Series.from_estimates(capitalize_acronyms(name), steps, estimates, colors[name])
            for name, (steps, estimates) in bands.items()
            if steps
        ]
        if lines and all(_has_constant_values(line) for line in lines):
            constant.append(f"{key} {_constant_text(lines)}")
        elif lines:
            (shared if len(lines) > 1 or key in _FIRST_METRICS else alone).append(Chart(key, lines))
    note = '<p class="note">Mean over training seeds; bands are 95% intervals.</p>'
    parts = [note + charts_html(shared)] if shared else []
    if alone:
        summary = f"{count_text(len(alone), 'metric')} of one method only"
        parts.append(_collapsible_html(summary, charts_html(alone)))
    if constant:
        parts.append(f'<p class="note">Constant: {esc("; ".join(constant))}.</p>')
    return "".join(parts)


def _collapsible_html(summary: str, body: str) -> str:
    """Return HTML that shows `summary` and reveals `body` on a click."""
    return f'<details class="fold"><summary>{summary}</summary>{body}</details>'


def _has_constant_values(line: Series) -> bool:
    """Return whether all runs of a method logged the same value at every step."""
    values = [*line.y, *line.low, *line.high]
    # The mean of five equal values may differ from them in its last digit.
    return len(line.x) > 1 and math.isclose(min(values), max(values), abs_tol=1e-12)


def _constant_text(lines: Sequence[Series]) -> str:
    """Return the value of constant lines: `0.01`, or `0.01 (PPO), 0.05 (RLOO)` if they differ."""
    levels = [short_number(line.y[0]) for line in lines]
    if len(set(levels)) == 1:
        return levels[0]
    return ", ".join(f"{level} ({line.name})" for level, line in zip(levels, lines, strict=True))


def _shown_metric_names(runs_by_method: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """Return the names of the logged metrics to show, the most important ones first."""
    rows = [row for runs in runs_by_method.values() for run in runs for row in run.metrics]
    logged = dict.fromkeys(key for row in rows for key in row)
    keys = [k for k in logged if "/" in k and not k.startswith(_IGNORED_PREFIXES)]
    first = [key for key in _FIRST_METRICS if key in keys]
    return first + sorted(set(keys) - set(first))


def _mean_last_value(runs: Sequence[RunRecord], key: str) -> Interval | None:
    """Return the mean over runs of the last logged value; None if no run logged the metric."""
    finals = [values[-1] for run in runs for values in [run.series(key)[1]] if values]
    return interval(finals, kind="mean") if finals else None


def _one_line_yaml(value: Any) -> str | None:
    """Return a configured value as YAML on one line."""
    if value is None or (isinstance(value, str) and value.isprintable() and value.strip()):
        return value
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**20
    )
    return text.removesuffix("\n").removesuffix("\n...")
