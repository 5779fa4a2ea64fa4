"""Show the evaluation results of several runs: verdicts, forest plots and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.common.text import count_text
from rlhf.evaluation.compare import Comparison, MethodScore, compare_runs, simulated_coverage_text
from rlhf.evaluation.metric_limits import ReferenceReturns
from rlhf.evaluation.metrics import metric_interval, unit_name
from rlhf.evaluation.records import (
    Evaluation,
    RunRecord,
    episode_metric_names,
    episode_value,
)
from rlhf.evaluation.run_groups import method_evaluations, method_names, run_names, training_seed
from rlhf.evaluation.significance import Difference
from rlhf.reports.charts import Series
from rlhf.reports.forest import ForestRow, titled_forest_plot_html
from rlhf.reports.markup import (
    Cell,
    Table,
    capital_acronyms_html,
    esc,
    interval_text,
    number_text,
    sentence_html,
)
from rlhf.stats import Interval

_HIDDEN_METRICS = frozenset({"seconds"})
"""Metrics that the tables omit."""


def compare_by_each_metric(
    runs: Sequence[RunRecord], headline_metric: str, *, every_pair: bool = False
) -> list[Comparison]:
    """Compare runs by `headline_metric`, then by other metrics that all evaluations have.

    Metrics that are equal in all episodes are omitted. The metrics "normalized", "seconds",
    "turns", "tokens" and "length_limited" are also omitted. If `every_pair` is set, trained methods
    are also compared with each other, see `compare_runs`.
    """
    first_rows = [item.evaluation.episodes[0] for item in method_evaluations(runs)]
    shared = set.intersection(*(set(episode_metric_names(row)) for row in first_rows))
    unused = {headline_metric, "normalized", "seconds", "turns", "tokens", "length_limited"}
    secondary = [metric for metric in sorted(shared - unused) if _has_several_values(runs, metric)]
    return [
        compare_runs(runs, metric=metric, every_pair=every_pair, keep_going=True)
        for metric in (headline_metric, *secondary)
    ]


def verdict_list_html(comparison: Comparison) -> str:
    """Return the results of the comparisons as an HTML list.

    An item is green if the method is significantly better than the baseline, and red if it is
    significantly worse.
    """
    items = [verdict_item_html(d, comparison.metric) for d in comparison.differences]
    return f'<ul class="verdicts">{"".join(items)}</ul>' if items else ""


def verdict_item_html(d: Difference, metric: str, tone: str = "") -> str:
    """Return the HTML list item of a verdict, with the paired difference below it.

    `tone` is the CSS class. By default, it is "good" if the method wins, and "bad" if the baseline
    wins.
    """
    tone = tone or {d.method: "good", d.baseline: "bad"}.get(d.winner or "", "")
    setting = " · ".join(part for part in (d.env, d.decoding) if part)
    return (
        f'<li class="{tone}"><strong>{verdict_html(d.verdict)}</strong>'
        f"<span>{capital_acronyms_html(f'{d.method} − {d.baseline}')}: "
        f"{signed_value_text(d.estimate)} "
        f"{esc(metric)}, 95% {interval_text(d.estimate)}, "
        f"{d.estimate.units} paired {esc(d.unit)} · {esc(setting)}</span></li>"
    )


def verdict_html(verdict: str) -> str:
    """Return a verdict as HTML; the first letter is a capital unless a name is the first word."""
    starts_with_word = verdict.startswith(("no ", "one "))
    return sentence_html(verdict) if starts_with_word else capital_acronyms_html(verdict)


def score_plots_html(
    comparison: Comparison,
    reference_returns: Mapping[str, ReferenceReturns],
    colors: Mapping[str, str] | None = None,
) -> str:
    """Return a forest plot of the methods' scores for each environment and decoding, as HTML.

    Args:
        comparison: Scores to draw.
        reference_returns: Environment -> returns of the random and the optimal policy, drawn as
            marks if the metric is the return.
        colors: Method -> CSS color class; by default all methods have the same color.
    """
    parts = []
    settings = dict.fromkeys((row.env, row.decoding) for row in comparison.rows)
    references = [row for row in comparison.rows if row.decoding in ("random", "expert")]
    for env, decoding in settings:
        if decoding in ("random", "expert"):
            continue
        rows = [row for row in comparison.rows if (row.env, row.decoding) == (env, decoding)]
        rows += [row for row in references if row.env == env]
        bound = reference_returns.get(env) if comparison.metric == "return" else None
        setting = " · ".join(part for part in (env, decoding) if part)
        lines = [_score_row(row, bound, colors or {}) for row in rows]
        marks = [(bound.random, "random"), (bound.optimal, "optimal")] if bound else []
        parts.append(titled_forest_plot_html(comparison.metric, setting, lines, marks))
    return "".join(parts)


def difference_plots_html(comparison: Comparison) -> str:
    """Return a forest plot of the paired differences from each baseline, as HTML.

    Differences with a winner are colored.
    """
    parts = []
    for baseline in dict.fromkeys(d.baseline for d in comparison.differences):
        lines = [
            _difference_row(d, comparison) for d in comparison.differences if d.baseline == baseline
        ]
        marks = [(0.0, f"{baseline} = 0")]
        parts.append(
            titled_forest_plot_html("Paired difference", f"from {baseline}, 95%", lines, marks)
        )
    return "".join(parts)


def evaluation_table(runs: Sequence[RunRecord], *, label_by_method: bool = False) -> Table:
    """Return the table of all evaluations, with their metrics and normalized returns.

    The rows are labeled by stage and policy, or by method and training seed if `label_by_method`
    is set.
    """
    items = (
        _evaluations_labeled_by_method(runs)
        if label_by_method
        else _evaluations_labeled_by_stage(runs)
    )
    evaluated = [(label, e, metrics) for label, e in items if (metrics := _evaluation_metrics(e))]
    keys = list(dict.fromkeys(key for _, _, metrics in evaluated for key in metrics))
    keys = [key for key in keys if key not in _HIDDEN_METRICS and key != "normalized"]
    fraction = any("normalized" in metrics for _, _, metrics in evaluated)
    columns = ["policy", "training seed"] if label_by_method else ["stage", "policy"]
    columns += ["environment", "decoding", "episodes", "over"]
    columns += (["fraction of optimal"] if fraction else []) + keys
    rows: list[list[Cell]] = []
    for label, evaluation, metrics in evaluated:
        count = evaluation.summary.get("episodes") or len(evaluation.episodes)
        cells: list[Cell] = [*label, evaluation.summary_field("env")]
        cells += [evaluation.summary_field("decoding"), int(count), _unit_count_text(evaluation)]
        cells += [metrics.get("normalized")] if fraction else []
        rows.append(cells + [metrics.get(key) for key in keys])
    return Table("evaluations", "Evaluations", columns, rows)


def _unit_count_text(evaluation: Evaluation) -> str | None:
    """Return the number and name of the independent units, such as "10 prompts"."""
    summary = evaluation.summary
    if "units" in summary and "unit" in summary:
        return count_text(int(summary["units"]), str(summary["unit"]).removesuffix("s"))
    if not evaluation.episodes:
        return None
    units = evaluation.unit_of_each_episode
    return count_text(len(set(units)), unit_name(units).removesuffix("s"))


def _evaluations_labeled_by_stage(runs: Sequence[RunRecord]) -> list[tuple[list[Cell], Evaluation]]:
    """Return the evaluations of the table with their labels (stage and policy).

    Evaluations that another run replaces are omitted, see `method_evaluations`.
    """
    current = {id(item.evaluation) for item in method_evaluations(runs)}
    return [
        ([name, e.summary_field("policy") or e.name], e)
        for name, run in zip(run_names([run.directory for run in runs]), runs, strict=True)
        for e in run.evaluations
        if id(e) in current or not e.episodes
    ]


def _evaluations_labeled_by_method(
    runs: Sequence[RunRecord],
) -> list[tuple[list[Cell], Evaluation]]:
    """Return the evaluations of the table with their labels (method and training seed)."""
    items: list[tuple[list[Cell], Evaluation]] = [
        ([item.method, None if item.has_untrained_policy else item.seed], item.evaluation)
        for item in method_evaluations(runs)
    ]
    labels = method_names([run.directory for run in runs])
    for label, run in zip(labels, runs, strict=True):
        seed = training_seed(run)
        items += [([f"{label} · {e.name}", seed], e) for e in run.evaluations if not e.episodes]
    return items


def difference_table(comparisons: Sequence[Comparison]) -> Table:
    """Return the table of the paired differences and verdicts for every metric."""
    columns = ["metric", "difference", "environment", "decoding", "mean", "pairs", "verdict"]
    rows: list[list[Cell]] = [
        [
            c.metric,
            f"{d.method} − {d.baseline}",
            d.env,
            d.decoding,
            d.estimate,
            count_text(d.estimate.units, d.unit.rstrip("s")),
            d.verdict,
        ]
        for c in comparisons
        for d in c.differences
    ]
    return Table("differences", "Paired differences", columns, rows)


def notes_html(comparisons: Sequence[Comparison]) -> str:
    """Return the notes of comparisons as HTML.

    The lowest simulated coverage in the first comparison is the first note.
    """
    worst = min(
        (d for c in comparisons[:1] for d in c.differences), key=_lowest_coverage, default=None
    )
    lines = [coverage] if worst and (coverage := simulated_coverage_text(worst)) else []
    lines += [note for c in comparisons for note in c.notes]
    return "".join(f'<p class="note">{sentence_html(line)}.</p>' for line in dict.fromkeys(lines))


def _lowest_coverage(difference: Difference) -> float:
    """Return the lower of the simulated coverages of a difference; 1 if none was simulated."""
    shares = (difference.coverage_normal, difference.coverage_observed)
    return min((share for share in shares if share is not None), default=1.0)


def reference_returns_by_environment(runs: Sequence[RunRecord]) -> dict[str, ReferenceReturns]:
    """Return environment -> returns of the random and the optimal policy, if both are known."""
    evaluations = (e for run in runs for e in run.evaluations)
    return {e.summary_field("env"): e.reference_returns for e in evaluations if e.reference_returns}


def _evaluation_metrics(evaluation: Evaluation) -> dict[str, Interval]:
    """Return the metrics of an evaluation, from its summary or else computed from its episodes.

    Summaries of version 0.1.0 treat each episode as a unit, so their metrics are computed again.
    """
    summary = evaluation.summary.get("metrics") or {}
    metrics = {key: interval_from_mapping(value) for key, value in summary.items() if value}
    names = episode_metric_names(evaluation.episodes[0]) if evaluation.episodes else []
    if names and "unit" not in evaluation.summary:
        repeated = len(set(evaluation.unit_of_each_episode)) < len(evaluation.episodes)
        metrics = {
            key: _without_interval(e) if repeated and "pass@" in key else e
            for key, e in metrics.items()
            if key not in names
        }
    for metric in (name for name in names if name not in metrics):
        scored = [
            (value, unit)
            for row, unit in zip(evaluation.episodes, evaluation.unit_of_each_episode, strict=True)
            if (value := episode_value(row, metric)) is not None
        ]
        if scored:
            values, units = zip(*scored, strict=True)
            metrics[metric] = metric_interval(metric, values, units, evaluation.limits)
    return metrics


def _without_interval(estimate: Interval) -> Interval:
    """Return an estimate without its interval, which an older version computed over other units."""
    return Interval.without_bounds(
        estimate.value, estimate.units, "computed by an older version: evaluate again"
    )


def interval_from_mapping(value: Mapping[str, Any]) -> Interval:
    """Convert a mapping with `mean` or `value`, `low`, `high` and `n` to an Interval.

    A missing number, or None, becomes nan; a missing `n` becomes 0.

    In reports on rewards, `n` is the number of values, and `groups` is the number of independent
    units.
    """
    numbers = (value.get("mean", value.get("value")), value.get("low"), value.get("high"))
    mean, low, high = (math.nan if number is None else float(number) for number in numbers)
    method, needs = value.get("method") or "", value.get("needs") or ""
    units = value.get("groups", value.get("n"))
    return Interval(mean, low, high, int(units or 0), method, needs)


def _has_several_values(runs: Sequence[RunRecord], metric: str) -> bool:
    """Return whether a metric has at least two different values in the episodes of runs."""
    values = {
        episode_value(row, metric)
        for item in method_evaluations(runs)
        for row in item.evaluation.episodes
    }
    return len(values - {None}) > 1


def _score_row(
    row: MethodScore, reference_returns: ReferenceReturns | None, colors: Mapping[str, str]
) -> ForestRow:
    """Return the row of a forest plot for the score of a method."""
    tone = "ref" if row.decoding in ("random", "expert") else colors.get(row.method, "c1")
    text = interval_text(row.estimate)
    if reference_returns:
        fraction = reference_returns.normalize(row.estimate.value)
        text = f"{f'{fraction:.0%} of optimal' if fraction >= 0 else 'below random'} · {text}"
    detail = f"{row.estimate.units:,} {row.unit}"
    return ForestRow(row.method, detail, row.estimate, number_text(row.estimate.value), text, tone)


def _difference_row(d: Difference, comparison: Comparison) -> ForestRow:
    """Return the row of a forest plot for a paired difference."""
    tone = {d.method: "gold", d.baseline: "c6"}.get(d.winner or "", "c5")
    several = len({(x.env, x.decoding) for x in comparison.differences}) > 1
    setting = f"{d.env} {d.decoding}" if several else f"{d.estimate.units:,} paired {d.unit}"
    return ForestRow(
        d.method,
        setting,
        d.estimate,
        signed_value_text(d.estimate),
        interval_text(d.estimate),
        tone,
    )


def signed_value_text(estimate: Interval) -> str:
    """Return the value of an estimate as text, with a plus or minus sign unless it is 0."""
    return f"{'+' if estimate.value > 0 else ''}{number_text(estimate.value)}"


def series_with_band(
    name: str, x: Sequence[float], rows: Sequence[Mapping[str, Any]], color: str
) -> Series:
    """Return a line through estimates with their intervals as a band.

    Each of `rows` is a mapping for `interval_from_mapping`.
    """
    return Series.from_estimates(name, x, [interval_from_mapping(row) for row in rows], color)


def score_table(comparison: Comparison) -> Table:
    """Return the table of the methods' scores in every setting of a comparison."""
    columns = ["method", "environment", "decoding", comparison.metric, "units", "episodes"]
    rows: list[list[Cell]] = [
        [r.method, r.env, r.decoding, r.estimate, r.unit, r.episodes] for r in comparison.rows
    ]
    return Table("scores", "Scores", columns, rows)
