"""`rlhf report DIR`: write one self-contained HTML page for a run or a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.common.files import write_text
from rlhf.evaluation.compare import Comparison, headline_metric
from rlhf.evaluation.records import RunRecord, read_runs
from rlhf.reports import results, transcripts
from rlhf.reports.markup import Table, esc, label_html, section
from rlhf.reports.overoptimization import (
    overoptimization_section,
    overoptimization_tables,
    read_results,
)
from rlhf.reports.page import page
from rlhf.reports.profile import profile_tables
from rlhf.reports.rewards import reward_quality, reward_tables
from rlhf.reports.sections import (
    header,
    learning_section,
    reward_section,
    warning_box,
    what_was_run,
)
from rlhf.reports.tables import save_curves, save_tables
from rlhf.reports.tokens import token_view

REPORT_FILE = "report.html"
"""File name of the page."""


def write_report(directory: str | Path) -> Path:
    """Write `report.html` of a run or pipeline directory, and its tables to `report_tables/`.

    Sections without data are omitted, for example if a run is still training or was not evaluated.

    Returns:
        The path of the page.

    Raises:
        UserError: the directory contains no run.
    """
    root = Path(directory)
    runs = read_runs(root)
    metric = headline_metric(runs)
    comparisons = results.comparisons(runs, metric, every_pair=True) if metric else []
    tables = [results.evaluation_table(runs), results.difference_table(comparisons)]
    tables = [table for table in tables if table.rows]
    tables += [*reward_tables(runs), *overoptimization_tables(read_results(runs))]
    tables += profile_tables(runs)
    save_tables(root / "report_tables", tables)
    # The curves are saved as CSV only, because metrics.jsonl already has them as JSON.
    save_curves(root / "report_tables", runs)
    target = root / REPORT_FILE
    title = root.resolve().name
    write_text(target, page(title, _body(title, runs, comparisons, tables)))
    return target


def _body(
    title: str,
    runs: Sequence[RunRecord],
    comparisons: Sequence[Comparison],
    tables: Sequence[Table],
) -> str:
    parts = [header(title, runs)]
    if comparisons:
        parts.append(results.verdict_list(comparisons[0]))
    parts.append(warning_box(runs))
    if comparisons:
        forests = results.score_forests(comparisons[0], results.known_bounds(runs))
        parts.append(section("Result", forests, results.difference_forest(comparisons[0])))
    parts.append(section("Proxy and gold reward", reward_section(runs)))
    parts.append(section("Reward models", reward_quality(runs)))
    parts.append(section("Over-optimization", overoptimization_section(read_results(runs))))
    shown = [f"<h3>{esc(table.title)}</h3>{table.to_html()}" for table in tables]
    parts.append(section("Tables", *shown, results.notes(comparisons)))
    parts.append(section("Transcripts", _transcripts(runs, comparisons)))
    parts.append(section("Learning curves", learning_section(runs)))
    parts.append(section("What was run", what_was_run(runs)))
    return "\n".join(part for part in parts if part)


def _transcripts(runs: Sequence[RunRecord], comparisons: Sequence[Comparison]) -> str:
    """Return the transcripts as HTML: across methods, before and after training, and by token."""
    parts = []
    if comparisons and (cards := transcripts.across_methods(runs, comparisons[0])):
        parts.append(f"<h3>One prompt, every stage</h3>{cards}")
    for run in runs:
        if cards := transcripts.before_and_after(run):
            parts.append(f"<h3>{label_html(run.name)} <small>before and after</small></h3>{cards}")
        if cards := token_view(run):
            parts.append(f"<h3>{label_html(run.name)} <small>token by token</small></h3>{cards}")
    return "".join(parts)
