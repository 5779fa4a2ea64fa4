"""Tables of a report as files: one CSV file each, and one JSON file for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlhf.common.numbers import is_number
from rlhf.evaluation.records import RunRecord
from rlhf.reports.markup import Table


def curve_table(runs: Sequence[RunRecord]) -> Table:
    """All logged metrics in long form: stage, step, metric, value."""
    rows = [
        [run.name, row.get("step"), key, float(value)]
        for run in runs
        for row in run.metrics
        for key, value in row.items()
        if key not in ("step", "time") and is_number(value)
    ]
    return Table("curves", "Curves", ["stage", "step", "metric", "value"], rows)


def save_tables(folder: Path, tables: Sequence[Table]) -> None:
    """`<slug>.csv` for each table and `tables.json` with all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        save_csv(folder, table)
    tree = {table.slug: table.to_records() for table in tables}
    text = json.dumps(tree, indent=1, ensure_ascii=False)
    (folder / "tables.json").write_text(text + "\n", encoding="utf-8")


def save_csv(folder: Path, table: Table) -> None:
    """`<slug>.csv` in an existing folder."""
    (folder / f"{table.slug}.csv").write_text(table.to_csv(), encoding="utf-8")
