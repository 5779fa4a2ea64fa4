"""Report section on rewards: accuracy, baselines, calibration and stress tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from rlhf.common.text import count_text
from rlhf.evaluation.records import Evaluation, RunRecord
from rlhf.reports.charts import Chart, Series, charts_html
from rlhf.reports.forest import ForestRow, forest_plot_html, titled_forest_plot_html
from rlhf.reports.markup import (
    Table,
    capital_acronyms_html,
    capitalize_acronyms,
    esc,
    interval_text,
    number_text,
    with_minus_signs,
)
from rlhf.reports.results import interval_from_mapping, series_with_band, signed_value_text
from rlhf.reward_models.report.tables import Report, flat_benchmark_scores, report_tables
from rlhf.stats import Interval


def is_reward_report(evaluation: Evaluation) -> bool:
    """Return whether an evaluation is the report of a reward on preference pairs."""
    return "accuracy" in evaluation.summary and "baselines" in evaluation.summary


def reward_reports_html(runs: Sequence[RunRecord], *, links: bool = True) -> str:
    """Return the section with the reports on rewards, as HTML.

    For one run, the section has the whole report. For several runs, it has only findings and
    accuracy and, with ``links``, a link to the page of each run, which is in a folder beside this
    page.
    """
    parts = []
    for run in runs:
        for evaluation in filter(is_reward_report, run.evaluations):
            report = evaluation.summary
            name = capital_acronyms_html(str(report.get("reward") or evaluation.name))
            parts.append(f"<h3>{name} <small>accuracy on held-out pairs</small></h3>")
            parts += [findings_html(report), accuracy_plot_html(report)]
            if len(runs) == 1:
                parts += [
                    accuracy_gain_plot_html(report),
                    charts_html(_preference_report_charts(report)),
                    stress_test_plot_html(report),
                ]
            elif links and (run.directory / "report.html").exists():
                link = f"{run.name}/report.html"
                note = f'Full report: <a href="{quote(link)}">{esc(link)}</a>'
                parts.append(f'<p class="note">{note}</p>')
    return "".join(parts)


def reward_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return tables of benchmark results and, for a single run, the tables of its reports."""
    tables = [
        _benchmark_table(evaluation)
        for run in runs
        for evaluation in run.evaluations
        if "benchmark" in evaluation.summary
    ]
    if len(runs) > 1:
        return tables
    for evaluation in filter(is_reward_report, runs[0].evaluations if runs else ()):
        for table in report_tables(evaluation.summary):
            name = f"{evaluation.name}_{table.name}"
            tables.append(_table_with_intervals(name, table.title, table.columns, table.rows))
    return tables


def findings_html(report: Report) -> str:
    """Return the findings of a report as an HTML list; good ones are green, bad ones are red."""
    items = "".join(
        f'<li class="{_finding_color_class(line)}">{esc(with_minus_signs(line))}</li>'
        for line in report.get("verdict") or []
    )
    return f'<ul class="verdicts brief">{items}</ul>' if items else ""


def _finding_color_class(line: str) -> str:
    """Return the CSS class of a finding: "good", "bad" or an empty string."""
    if line.startswith(("Better than", "No problem")):
        return "good"
    return "" if line.startswith(("Only", "Choosing", "Underconfident")) else "bad"


def accuracy_plot_html(report: Report) -> str:
    """Return a forest plot of the accuracy of the reward and of the baselines."""
    name = str(report.get("reward") or "reward")
    lines = [_accuracy_row(name, report["accuracy"], "c1")]
    lines += [
        _accuracy_row(baseline, row["accuracy"], "c5")
        for baseline, row in report["baselines"].items()
    ]
    return forest_plot_html(lines, [(0.5, "chance level")])


def _accuracy_row(name: str, accuracy: Report, tone: str) -> ForestRow:
    estimate = interval_from_mapping(accuracy)
    remark = interval_text(estimate)
    if estimate.known:
        remark = f"[{estimate.low:.1%}, {estimate.high:.1%}]"
    return ForestRow(
        name, count_text(estimate.units, "prompt"), estimate, f"{estimate.value:.1%}", remark, tone
    )


def accuracy_gain_plot_html(report: Report) -> str:
    """Return a forest plot of the paired gain in accuracy over each baseline."""
    lines = []
    for name, row in report["baselines"].items():
        gain = interval_from_mapping(row["gain"])
        tone, prompts = color_class_of_gain(gain), count_text(gain.units, "prompt")
        lines.append(
            ForestRow(
                f"over {name}", prompts, gain, signed_value_text(gain), interval_text(gain), tone
            )
        )
    detail = "over each baseline, with 95% intervals"
    return titled_forest_plot_html("Paired gain in accuracy", detail, lines, [(0.0, "no gain")])


def stress_test_plot_html(report: Report) -> str:
    """Return a forest plot of the change of the score in each stress test."""
    lines = []
    for name, test in (report.get("stress") or {}).items():
        change = interval_from_mapping(test["change"])
        tone = {True: "gold", False: "c6", None: "c5"}[test["passed"]]
        detail = f"should {test['expect']} · {test['fell'] or 0:.0%} of scores fell"
        lines.append(
            ForestRow(
                name.replace("_", " "),
                detail,
                change,
                signed_value_text(change),
                interval_text(change),
                tone,
            )
        )
    detail = "change of the score in standard deviations"
    return titled_forest_plot_html("Stress tests", detail, lines, [(0.0, "unchanged")])


def _preference_report_charts(report: Report) -> list[Chart]:
    """Return the charts of accuracy, calibration and, if it was measured, best-of-n."""
    margins, gaps = report["by_margin"], report["by_length_gap"]
    charts = [
        Chart(
            "Accuracy by size of the margin",
            _accuracy_and_chance_series([float(k + 1) for k in range(len(margins))], margins),
            "Deciles of |score difference|, in ascending order; bands are 95% intervals.",
            "decile",
            y_label="share of pairs",
        ),
        Chart(
            "Accuracy by length gap",
            _accuracy_and_chance_series([(row["from"] + row["to"]) / 2 for row in gaps], gaps),
            "Quintiles of the length of the chosen minus that of the rejected reply.",
            "characters",
            y_label="share of pairs",
        ),
        _calibration_chart(report),
    ]
    return charts + (best_of_n_charts(report["best_of_n"]) if report.get("best_of_n") else [])


def _accuracy_and_chance_series(x: Sequence[float], rows: Sequence[Report]) -> list[Series]:
    """Return the line of the accuracy over `x`, and the line of the chance level."""
    accuracy = series_with_band("accuracy", x, [row["accuracy"] for row in rows], "c1")
    return [accuracy, Series("chance level", [x[0], x[-1]], [0.5, 0.5], "c5")]


def _calibration_chart(report: Report) -> Chart:
    """Return the chart of accuracy over predicted probability, as given and after calibration."""
    lines = [Series("perfect calibration", [0.5, 1.0], [0.5, 1.0], "c5")]
    for name, key, color in (("as given", "as_given", "c2"), ("fitted", "fitted", "c3")):
        bins = [b for b in report["calibration"][key]["bins"] if b["confidence"] is not None]
        x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        lines.append(Series(name, x, y, color))
    interval = report["calibration"].get("temperature")
    fitted = report["calibration"]["fitted"]["temperature"]
    note = "Proportion of correct pairs by predicted probability, σ(|margin| / T)."
    if fitted is not None:
        note += f" Fitted T {number_text(fitted)}"
        if interval:
            ends = (interval["low"], interval["high"])
            low, high = ("∞" if end is None else number_text(end) for end in ends)
            note += f" [{low}, {high}]"
        note += "."
    return Chart("Calibration", lines, note, "predicted probability", y_label="share correct")


def best_of_n_charts(best_of_n: Report) -> list[Chart]:
    """Return charts of the reward and the gold score of best-of-n samples, over sqrt(KL)."""
    d = [math.sqrt(kl) for kl in best_of_n["kl"]]
    proxy = series_with_band("this reward", d, best_of_n["proxy_score"], "proxy")
    gold = [series_with_band("gold", d, best_of_n["gold"], "gold")]
    return [
        Chart("Best of n: this reward", [proxy], "", "√KL", y_label="score in standard deviations"),
        Chart(
            "Best of n: gold",
            gold,
            f"Unbiased estimates for n up to {best_of_n['ns'][-1]}.",
            "√KL",
            y_label="score",
        ),
    ]


def _table_with_intervals(
    name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> Table:
    """Return a table in which mappings are converted to Interval cells."""
    cells = [
        [interval_from_mapping(c) if isinstance(c, Mapping) else c for c in row] for row in rows
    ]
    return Table(name, title, columns, cells)


def _benchmark_table(evaluation: Evaluation) -> Table:
    """Return the table of a reward's scores on a public benchmark."""
    result = evaluation.summary["benchmark"]
    title = capitalize_acronyms(evaluation.name)
    if result.get("absent"):
        title += f" (not in the file: {', '.join(result['absent'])})"
    return _table_with_intervals(
        evaluation.name, title, ["part", "score"], flat_benchmark_scores(result)
    )


def color_class_of_gain(gain: Interval) -> str:
    """Return the CSS class of a gain: gold if its interval is above 0, c6 if below, else c5."""
    return "gold" if gain.low > 0 else "c6" if gain.high < 0 else "c5"
