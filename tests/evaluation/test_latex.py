"""Tables for a paper: numbers, intervals, and text that LaTeX would read as commands."""

import math

from rlhf.reports.latex import escape_latex, table_latex
from rlhf.reports.markup import Table
from rlhf.reports.tables import save_tables
from rlhf.stats import Interval

TABLE = Table(
    "t",
    "A_b & 50%",
    ["policy", "score", "note"],
    [
        ["ppo_a", Interval(-0.25, -0.5, 0.125, 7, "t"), "x & y"],
        ["10% {b}", Interval.without_bounds(0.5, 3, "3 units"), None],
        ["c", 3, "\\input{x}\n\\end{tabular}"],
        ["d", math.nan, "$^~#<>|"],
        ["e", -3, "-3"],
    ],
)


def test_a_table_by_hand():
    assert table_latex(TABLE) == (
        "% A\\_b \\& 50\\%\n"
        "\\begin{tabular}{lrl}\n"
        "\\toprule\n"
        "policy & score & note \\\\\n"
        "\\midrule\n"
        "ppo\\_a & $-$0.250 [$-$0.500, 0.125] & x \\& y \\\\\n"
        "10\\% \\{b\\} & 0.500 & -- \\\\\n"
        "c & 3 & \\textbackslash{}input\\{x\\} \\textbackslash{}end\\{tabular\\} \\\\\n"
        "d & -- & \\$\\textasciicircum{}\\textasciitilde{}\\#\\textless{}\\textgreater{}"
        "\\textbar{} \\\\\n"
        "e & $-$3 & -3 \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_no_character_starts_a_command_or_a_comment():
    text = escape_latex("".join(map(chr, range(32, 127))))
    assert text.count("\\") == sum(text.count(f"\\{c}") for c in "&%$#_{}t")
    assert "\n" not in escape_latex("a\r\nb\u2028c")


def test_a_name_is_no_argument_of_the_row_before():
    """LaTeX reads a bracket or a star after the end of a row as a part of the command."""
    table = Table("t", "T", ["*a", "b"], [["[x]", 1], ["*best", 2], ["a[1]*", 3]])
    rows = [line for line in table_latex(table).splitlines() if line.endswith("\\\\")]
    assert rows == ["{}*a & b \\\\", "{}[x] & 1 \\\\", "{}*best & 2 \\\\", "a[1]* & 3 \\\\"]


def test_tables_are_saved_in_three_forms(tmp_path):
    save_tables(tmp_path / "new", [TABLE])
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"t.csv", "t.tex", "tables.json"}
    assert (tmp_path / "new/t.tex").read_text() == table_latex(TABLE)
