"""Write a table of a report as LaTeX, with the rules of the package booktabs."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rlhf.common.numbers import decimal_text
from rlhf.common.text import escape_invisible
from rlhf.reports.markup import Cell, Table
from rlhf.stats import Interval

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "–": "--",
}


def table_latex(table: Table) -> str:
    r"""Return a table as a ``tabular`` environment, for a document with ``\usepackage{booktabs}``.

    An interval is written as ``value [low, high]``. Columns with numbers are aligned to the right.
    """
    numeric = [
        any(isinstance(row[i], int | float | Interval) for row in table.rows)
        for i in range(len(table.columns))
    ]
    align = "".join("r" if number else "l" for number in numeric)
    lines = [f"% {escape_latex(table.title)}", rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    lines.append(_row_latex(table.columns))
    lines.append(r"\midrule")
    lines += [_row_latex(row) for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escape_latex(text: str) -> str:
    """Return text in which characters with a meaning in LaTeX are escaped, in one line."""
    line = " ".join(escape_invisible(text).split())
    return "".join(_SPECIAL.get(character, character) for character in line)


def _row_latex(cells: Iterable[Cell]) -> str:
    r"""Return a row of a table.

    An empty group precedes a row that begins with a bracket or a star. LaTeX would otherwise read
    them as an argument of the ``\\`` that ends the row before.
    """
    row = " & ".join(map(_cell_latex, cells))
    return f"{'{}' * row.startswith(('[', '*'))}{row} \\\\"


def _cell_latex(cell: Cell) -> str:
    if cell is None:
        return "--"
    if isinstance(cell, Interval):
        ends = (cell.low, cell.high)
        interval = f" [{', '.join(map(_number_latex, ends))}]" if cell.known else ""
        return f"{_number_latex(cell.value)}{interval}"
    if isinstance(cell, float):
        return _number_latex(cell)
    if isinstance(cell, int) and cell < 0:
        return f"$-${-cell}"
    return escape_latex(str(cell))


def _number_latex(value: float) -> str:
    """Return a number with a LaTeX minus sign, or a dash if it is not finite."""
    if not math.isfinite(value):
        return "--"
    text = decimal_text(value)
    return text.replace("-", "$-$", 1) if text.startswith("-") else text
