"""Format tables for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.common.text import escape_invisible


def table_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as a table for the terminal; a missing value is an empty cell.

    Args:
        rows: Column name -> value, for each row.
        columns: Names of the columns to show, in order.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(_terminal_cell_text(row.get(column))) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def _terminal_cell_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else escape_invisible(str(value))
