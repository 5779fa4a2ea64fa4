"""`rlhf report DIR`: write one self-contained HTML page for a run or a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.common.files import write_text
from rlhf.evaluation.compare import Comparison, headline_metric
from rlhf.evaluation.records import RunRecord, read_runs
from rlhf.reports import results, transcripts
from rlhf.reports.markup import Table, capital_acronyms_html, esc, section_html
from rlhf.reports.overoptimization import (
    overoptimization_section_html,
    overoptimization_tables,
    read_overoptimization_results,
)
from rlhf.reports.page import page_html, write_page
from rlhf.reports.profile import profile_tables
from rlhf.reports.rewards import reward_reports_html, reward_tables
from rlhf.reports.sections import (
    header_html,
    learning_curves_html,
    reward_curves_html,
    run_details_html,
    warning_box_html,
)
from rlhf.reports.tables import save_curves_csv, save_tables
from rlhf.reports.tokens import token_samples_html
from rlhf.runs.claim import path_without_dot_dot, written_by_toolkit

REPORT_FILE = "report.html"
"""File name of the page."""


def write_report(directory: str | Path) -> Path:
    """Write `report.html` of a run or pipeline directory, and its tables to `report_tables/`.

    Sections without data are omitted, for example if a run is still training or was not evaluated.

    Returns:
        The path of the page.

    Raises:
        UserError: The directory contains no run, or the page would replace a file of the user.
    """
    root = path_without_dot_dot(directory)
    runs = read_runs(root)
    metric = headline_metric(runs)
    comparisons = results.compare_by_each_metric(runs, metric, every_pair=True) if metric else []
    tables = [results.evaluation_table(runs), results.difference_table(comparisons)]
    tables = [table for table in tables if table.rows]
    tables += [*reward_tables(runs), *overoptimization_tables(read_overoptimization_results(runs))]
    tables += profile_tables(runs)
    save_tables(root / "report_tables", tables)
    # The curves are saved as CSV only, because metrics.jsonl already has them as JSON.
    save_curves_csv(root / "report_tables", runs)
    target = root / REPORT_FILE
    title = root.resolve().name
    # In a directory that the toolkit made, the page is replaced without a check of its content.
    write = write_text if written_by_toolkit(root) else write_page
    write(target, page_html(title, _body_html(title, runs, comparisons, tables)))
    return target


def _body_html(
    title: str,
    runs: Sequence[RunRecord],
    comparisons: Sequence[Comparison],
    tables: Sequence[Table],
) -> str:
    parts = [header_html(title, runs)]
    if comparisons:
        parts.append(results.verdict_list_html(comparisons[0]))
    parts.append(warning_box_html(runs))
    if comparisons:
        forests = results.score_plots_html(
            comparisons[0], results.reference_returns_by_environment(runs)
        )
        parts.append(section_html("Result", forests, results.difference_plots_html(comparisons[0])))
    parts.append(section_html("Proxy and gold reward", reward_curves_html(runs)))
    parts.append(section_html("Reward models", reward_reports_html(runs)))
    parts.append(
        section_html(
            "Over-optimization", overoptimization_section_html(read_overoptimization_results(runs))
        )
    )
    shown = [f"<h3>{esc(table.title)}</h3>{table.to_html()}" for table in tables]
    parts.append(section_html("Tables", *shown, results.notes_html(comparisons)))
    parts.append(section_html("Transcripts", _transcripts_html(runs, comparisons)))
    parts.append(section_html("Learning curves", learning_curves_html(runs)))
    parts.append(section_html("What was run", run_details_html(runs)))
    return "\n".join(part for part in parts if part)


def _transcripts_html(runs: Sequence[RunRecord], comparisons: Sequence[Comparison]) -> str:
    """Return the transcripts as HTML: across methods, before and after training, and by token."""
    parts = []
    if comparisons and (cards := transcripts.methods_side_by_side_html(runs, comparisons[0])):
        parts.append(f"<h3>The same prompts, every trained method</h3>{cards}")
    for run in runs:
        if cards := transcripts.samples_before_and_after_html(run):
            parts.append(
                f"<h3>{capital_acronyms_html(run.name)} <small>before and after</small></h3>{cards}"
            )
        if cards := token_samples_html(run):
            parts.append(
                f"<h3>{capital_acronyms_html(run.name)} <small>token by token</small></h3>{cards}"
            )
    return "".join(parts)
