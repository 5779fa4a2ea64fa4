"""Save the tables of a report as CSV and LaTeX files, and as one JSON file with all tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from rlhf.common.files import atomic_path, write_text
from rlhf.common.numbers import is_number
from rlhf.common.text import formula_safe_csv_cell
from rlhf.common.yaml_text import read_mapping_or_empty
from rlhf.errors import UserError
from rlhf.evaluation.records import RunRecord
from rlhf.reports.latex import table_latex
from rlhf.reports.markup import Table

_X_COLUMNS = ("step", "time")
_TABLES_FILE = "tables.json"


def save_curves_csv(folder: Path, runs: Sequence[RunRecord]) -> None:
    """Write all logged metrics to `curves.csv`, one line for each stage, step and metric."""
    with atomic_path(folder / "curves.csv") as partial, partial.open("w", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["stage", "step", "metric", "value"])
        for run in runs:
            name, cells = (
                formula_safe_csv_cell(run.name),
                {key: formula_safe_csv_cell(key) for key in logged_metric_names(run)},
            )
            for row in run.metrics:
                step = row.get("step")
                writer.writerows(
                    (name, step, cells[key], float(value))
                    for key, value in row.items()
                    if key in cells and is_number(value)
                )


def logged_metric_names(run: RunRecord) -> list[str]:
    """Return the names of the metrics that a run logged, in order of first appearance."""
    return [
        key for key in dict.fromkeys(k for row in run.metrics for k in row) if key not in _X_COLUMNS
    ]


def save_tables_beside_other_files(folder: Path, tables: Sequence[Table]) -> None:
    """Save tables like `save_tables` in a folder that a user chose.

    Raises:
        UserError: A file would be replaced, and the folder has no `tables.json` of `save_tables`.
    """
    listed = read_mapping_or_empty(folder / _TABLES_FILE)
    if not (listed and all(isinstance(rows, list) for rows in listed.values())):
        names = [f"{table.slug}{suffix}" for table in tables for suffix in (".csv", ".tex")]
        for path in (folder / name for name in (_TABLES_FILE, *names)):
            if path.exists():
                raise UserError(
                    f"{path} is not a table of this toolkit, so it is not replaced: choose another "
                    "path"
                )
    save_tables(folder, tables)


def save_tables(folder: Path, tables: Sequence[Table]) -> None:
    """Write `<slug>.csv` and `<slug>.tex` for each table, and `tables.json` with all tables.

    `tables.json` is written first. If a later file cannot be written, for example because the disk
    is full, `save_tables_beside_other_files` can therefore replace the files in a second attempt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tree = {table.slug: table.to_records() for table in tables}
    text = json.dumps(tree, indent=1, ensure_ascii=False)
    write_text(folder / _TABLES_FILE, text + "\n")
    for table in tables:
        save_table_csv(folder, table)
        write_text(folder / f"{table.slug}.tex", table_latex(table))


def save_table_csv(folder: Path, table: Table) -> None:
    """Write a table as `<slug>.csv` into a folder that exists."""
    write_text(folder / f"{table.slug}.csv", table.to_csv())
