"""Write a benchmark's result as Markdown, CSV, JSON, an HTML page, and a page per environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from rlhf.common.files import write_text
from rlhf.evaluation.compare import simulated_coverage_text
from rlhf.reports import write_comparison_report
from rlhf.reports.charts import Chart, Series, charts_html
from rlhf.reports.comparison_page import method_tiles_html
from rlhf.reports.forest import ForestRow, titled_forest_plot_html
from rlhf.reports.markup import (
    Table,
    capitalize_acronyms,
    esc,
    interval_text,
    number_text,
    section_html,
    sentence_html,
)
from rlhf.reports.page import page_html
from rlhf.reports.results import verdict_html, verdict_item_html
from rlhf.reports.tables import save_tables
from rlhf.studies.bench.plan import REFERENCE_FOLDER, Bench
from rlhf.studies.bench.result import (
    bench_json_content,
    bench_markdown,
    make_bench_tables,
    protocol_sentences,
    verdict_lines,
)
from rlhf.studies.bench.scores import SCORE_METRIC, THRESHOLDS, BenchScores, Findings

MAX_CHART_ALGORITHMS = 6
"""Number of colors, which is the maximum number of algorithms in a chart."""


def write_bench_report(bench: Bench, scores: BenchScores, findings: Findings) -> Path:
    """Write the result of a finished benchmark into its directory.

    Returns:
        The path of `report.html`.
    """
    root = bench.root
    tables = make_bench_tables(scores, findings, baseline=bench.baseline)
    save_tables(root / "tables", tables)
    text = json.dumps(bench_json_content(bench, scores, findings), indent=1)
    write_text(root / "bench.json", text + "\n")
    write_text(root / "bench.md", bench_markdown(bench, findings, tables))
    pages = _write_environment_pages(bench)
    body = _body_html(bench, findings, tables, pages)
    write_text(root / "report.html", page_html("Benchmark", body))
    return root / "report.html"


def _write_environment_pages(bench: Bench) -> dict[str, str]:
    """Write the comparison page of each environment.

    Returns:
        Environment -> path of its page, relative to the directory of the benchmark.
    """
    folder = bench.root / "pages"
    folder.mkdir(exist_ok=True)
    pages = {}
    for name in bench.environments:
        rows = ["evaluate", *bench.algorithms]
        runs = [bench.run_path(name, f"seed{s}", row) for row in rows for s in bench.config.seeds]
        untrained = bench.untrained_rows_of(name)
        references = [bench.run_path(name, REFERENCE_FOLDER)] if untrained else []
        write_comparison_report([*runs, *references], folder / f"{name}.html")
        pages[name] = f"pages/{name}.html"
    return pages


def _body_html(
    bench: Bench, findings: Findings, tables: Sequence[Table], pages: Mapping[str, str]
) -> str:
    """Return the body of the page; `pages` is the result of `_write_environment_pages`."""
    notes = "".join(
        f'<p class="note">{sentence_html(line)}</p>' for line in protocol_sentences(bench)
    )
    parts = [f"<header><h1>Benchmark</h1>{_tiles_html(findings)}</header>", notes]
    parts.append(_comparison_list_html(findings))
    parts.append(section_html("Result", _score_plot_html(findings)))
    parts.append(section_html("Charts", _charts_html(findings)))
    links = "".join(f'<li><a href="{quote(p)}">{esc(env)}</a></li>' for env, p in pages.items())
    parts.append(section_html("Environments", f"<ul>{links}</ul>"))
    parts += [section_html(table.title, table.to_html()) for table in tables]
    return "\n".join(parts)


def _algorithm_colors(findings: Findings) -> dict[str, str]:
    """Return algorithm -> CSS color class.

    Colors are assigned in the order of the manifest, as on the pages of the environments.
    """
    return {
        name: f"c{index % MAX_CHART_ALGORITHMS + 1}" for index, name in enumerate(findings.curves)
    }


def _tiles_html(findings: Findings) -> str:
    """Return a tile with the color and the interquartile mean of each algorithm, as HTML."""
    colors = _algorithm_colors(findings)
    means = {name: findings.aggregates[name]["IQM"] for name in colors}
    scores = {name: f"IQM {number_text(e.value)} {interval_text(e)}" for name, e in means.items()}
    return method_tiles_html(scores, colors)


def _comparison_list_html(findings: Findings) -> str:
    """Return the results of the comparisons between trained rows as an HTML list.

    An item on the baseline is green if the row is significantly better than the baseline, and red
    if it is significantly worse. An item on two algorithms that differ significantly is green.
    """
    significant = [d for d in findings.pairs if d.winner]
    items = [verdict_item_html(d, SCORE_METRIC) for d in findings.against_baseline]
    items += [verdict_item_html(d, SCORE_METRIC, "good") for d in significant]
    lines = verdict_lines(findings)[len(items) :]
    coverage = {simulated_coverage_text(d) for d in findings.differences}
    items += [f"<li><strong>{verdict_html(x)}</strong></li>" for x in lines if x not in coverage]
    notes = [f'<p class="note">{sentence_html(x)}.</p>' for x in lines if x in coverage]
    return f'<ul class="verdicts">{"".join(items)}</ul>{"".join(notes)}'


def _score_plot_html(findings: Findings) -> str:
    """Return the forest plot of the IQM of every row that all environments have.

    Vertical lines show the scores of the random and the optimal policy.
    """
    lines, colors = [], _algorithm_colors(findings)
    for name, aggregates in findings.aggregates.items():
        estimate = aggregates["IQM"]
        text = f"{estimate.units} seeds" if estimate.units > 1 else "not trained"
        value, tone = number_text(estimate.value), colors.get(name, "ref")
        lines.append(ForestRow(name, text, estimate, value, interval_text(estimate), tone))
    marks = [(0.0, "random"), (1.0, "optimal")]
    return titled_forest_plot_html(
        "Interquartile mean", "over environments and seeds, 95%", lines, marks
    )


def _charts_html(findings: Findings) -> str:
    """Return the charts of learning curves and performance profiles, as HTML.

    A chart has up to `MAX_CHART_ALGORITHMS` algorithms.
    """
    charts = []
    names = list(findings.curves)
    for first in range(0, len(names), MAX_CHART_ALGORITHMS):
        shown = names[first : first + MAX_CHART_ALGORITHMS]
        charts += [
            _sample_efficiency_chart(findings, shown),
            _performance_profile_chart(findings, shown),
        ]
    return charts_html(charts)


def _sample_efficiency_chart(findings: Findings, names: Sequence[str]) -> Chart:
    """Return the chart of the IQM during training."""
    lines, colors = [], _algorithm_colors(findings)
    for name in names:
        curve = findings.curves[name]
        shares = [100 * step / (len(curve) - 1) for step in range(len(curve))]
        lines.append(Series.from_estimates(capitalize_acronyms(name), shares, curve, colors[name]))
    note = "IQM on held-out episodes during training; bands are 95% bootstrap intervals."
    return Chart("Sample efficiency", lines, note, x_label="%", y_label="normalized score")


def _performance_profile_chart(findings: Findings, names: Sequence[str]) -> Chart:
    """Return the chart of the performance profiles; the initial models are gray."""
    colors = _algorithm_colors(findings)
    start = [name for name in findings.profile if name not in findings.curves]
    lines = [
        Series(
            capitalize_acronyms(name),
            THRESHOLDS,
            findings.profile[name].tolist(),
            colors.get(name, "ref"),
        )
        for name in (*start, *names)
    ]
    note = "Proportion of runs (environments and seeds) with a score above x."
    return Chart("Performance profile", lines, note, x_label="score", y_label="share of runs")
