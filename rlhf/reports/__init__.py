"""`rlhf report`: one self-contained HTML page per run, pipeline or comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.evaluation.compare import Comparison, headline_metric
from rlhf.evaluation.records import RunRecord, read_stages
from rlhf.reports import results, transcripts
from rlhf.reports.comparison_page import write_comparison_report
from rlhf.reports.markup import Table, esc, named, section
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
from rlhf.reports.tables import curve_table, save_csv, save_tables
from rlhf.reports.tokens import token_view

__all__ = ["write_comparison_report", "write_report"]


def write_report(directory: str | Path) -> Path:
    """Write `report.html` of a run or pipeline directory, and its tables as CSV and JSON beside it.

    Works on what is there: a run still going on, or one that was never evaluated, gives a shorter
    page. The tables lie in `report_tables/`. Raises UserError when the folder holds no run.
    """
    root = Path(directory)
    runs = read_stages(root)
    metric = headline_metric(runs)
    found = results.comparisons(runs, metric, every_pair=True) if metric else []
    tables = [
        table
        for table in (results.evaluation_table(runs), results.difference_table(found))
        if table is not None
    ]
    tables += [*reward_tables(runs), *overoptimization_tables(read_results(runs))]
    tables += profile_tables(runs)
    save_tables(root / "report_tables", tables)
    # As JSON the curves exist already: metrics.jsonl.
    save_csv(root / "report_tables", curve_table(runs))
    target = root / "report.html"
    title = root.resolve().name
    target.write_text(page(title, _body(title, runs, found, tables)), encoding="utf-8")
    return target


def _body(
    title: str, runs: Sequence[RunRecord], found: Sequence[Comparison], tables: Sequence[Table]
) -> str:
    parts = [header(title, runs)]
    if found:
        parts.append(results.verdict_list(found[0]))
    parts.append(warning_box(runs))
    if found:
        limits = results.known_bounds(runs)
        forests = results.score_forests(found[0], limits)
        parts.append(section("Result", forests, results.difference_forest(found[0])))
    parts.append(section("Proxy and gold reward", reward_section(runs)))
    parts.append(section("Reward models", reward_quality(runs)))
    parts.append(section("Over-optimization", overoptimization_section(read_results(runs))))
    shown = [f"<h3>{esc(table.title)}</h3>{table.to_html()}" for table in tables]
    parts.append(section("Tables", *shown, results.notes(found)))
    parts.append(section("Transcripts", _transcripts(runs, found)))
    parts.append(section("Learning curves", learning_section(runs)))
    parts.append(section("What was run", what_was_run(runs)))
    return "\n".join(part for part in parts if part)


def _transcripts(runs: Sequence[RunRecord], found: Sequence[Comparison]) -> str:
    parts = []
    if found and (cards := transcripts.across_methods(runs, found[0])):
        parts.append(f"<h3>One prompt, every stage</h3>{cards}")
    for run in runs:
        if cards := transcripts.before_and_after(run):
            parts.append(f"<h3>{esc(named(run.name))} <small>before and after</small></h3>{cards}")
        if cards := token_view(run):
            parts.append(f"<h3>{esc(named(run.name))} <small>token by token</small></h3>{cards}")
    return "".join(parts)
