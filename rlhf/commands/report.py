"""Implements `rlhf report` and `rlhf compare`, which report on runs and compare them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.errors import UserError


@dataclass(frozen=True)
class ReportConfig:
    """Configuration of `rlhf report`."""

    directories: list[str] = field(default_factory=list)
    """Directories of runs or pipelines."""
    output: str | None = None
    """HTML file of a comparison of several runs; the default is comparison.html. The report of a
    single run is always written to its directory."""

    def __post_init__(self) -> None:
        if not self.directories:
            raise UserError("report: give at least one run directory")
        if self.output and len(self.directories) == 1:
            raise UserError(
                "report: --output needs several runs; the report of one run is written to its "
                "directory"
            )
        if self.output and Path(self.output).is_dir():
            raise UserError(f"report: --output {self.output} is a folder: give the path of a file")


@dataclass(frozen=True)
class CompareConfig:
    """Configuration of `rlhf compare`."""

    runs: list[str] = field(default_factory=list)
    """Directories of runs or pipelines with evaluations."""
    metric: str | None = None
    """Metric to compare: return, success, cost, turns, invalid, tokens, normalized, or the name of
    a reward. By default, the return is compared. If every return is 0, as for prompt datasets, the
    gold score is compared if it was computed, and the training reward otherwise. The default for
    reward models that were evaluated on preference pairs is accuracy."""
    baseline: str | None = None
    """Method with which the other methods are compared; the default is the first trained method.
    With the default and a single directory, the trained methods are also compared with each
    other."""
    tables: str | None = None
    """Folder to which the scores and the differences are written as CSV, LaTeX and JSON."""
    json: bool = False
    """Print JSON instead of Markdown."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("compare: give at least one run directory")
        if self.tables and Path(self.tables).is_file():
            raise UserError(f"compare: --tables {self.tables} is a file: give the path of a folder")


def report(config: ReportConfig) -> Iterator[str]:
    """Write the report of one run, or a comparison of several runs; yield the path of the page."""
    from rlhf.reports import write_comparison_report, write_report

    folders = [Path(directory) for directory in config.directories]
    if len(folders) == 1:
        yield str(write_report(folders[0]))
    else:
        yield str(write_comparison_report(folders, Path(config.output or "comparison.html")))


def compare(config: CompareConfig) -> Iterator[str]:
    """Yield the comparison as Markdown or JSON; write its tables to the folder `tables`, if set."""
    from rlhf.evaluation.compare import compare as compare_runs

    runs = [Path(run) for run in config.runs]
    result = compare_runs(runs, metric=config.metric, baseline=config.baseline)
    if config.tables:
        from rlhf.reports.results import difference_table, score_table
        from rlhf.reports.tables import save_tables_beside_other_files

        tables = [score_table(result), difference_table([result])]
        save_tables_beside_other_files(Path(config.tables), tables)
    yield result.to_json() if config.json else result.to_markdown()
