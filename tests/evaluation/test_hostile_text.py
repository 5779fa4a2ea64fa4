"""Text of models and users cannot run or deform a page, a table, a terminal or a log."""

import csv
import io
import json
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.cli.main import main
from rlhf.commands.tables import table_text
from rlhf.common.text import (
    SafeLogFormatter,
    escape_invisible,
    escape_markdown,
    formula_safe_csv_cell,
    markdown_table,
)
from rlhf.evaluation.compare import compare
from rlhf.reports.markup import Table, esc
from rlhf.reports.page import page_html
from rlhf.runs.progress import ProgressDisplay
from tests.evaluation.hostile_pages import (
    ESC,
    EVERYTHING,
    HOSTILE,
    RLO,
    hostile_pipeline,
    pages_of,
)

CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_text_leaves_without_codes(text: str):
    for shown in (
        escape_invisible(text),
        esc(text),
        escape_markdown(text),
        str(formula_safe_csv_cell(text)),
    ):
        assert not CODES.search(shown)
        shown.encode()
    assert not re.search("[<>\"']", esc(text).replace("&#x27;", ""))


def test_escapes_are_those_of_json():
    text = f"{ESC}[2J {RLO} \x85 \x00 plain é 漢 🙂 \ud800"
    line = json.dumps({"text": text}, ensure_ascii=False)
    assert json.loads(escape_invisible(line)) == {"text": text}
    assert escape_invisible("tab\tand\nnewline\r\n é שלום 🙂") == "tab\tand\nnewline\r\n é שלום 🙂"


def test_a_markdown_table_keeps_its_shape():
    table = markdown_table(
        ["name", "mean"], [[text, "0.5 [0.4, 0.6]"] for text in HOSTILE.values()]
    )
    lines = table.splitlines()
    assert len(lines) == 2 + len(HOSTILE)
    for line in lines[2:]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
        assert line.endswith("| 0.5 [0.4, 0.6] |")
        assert not re.search(r"(?<!\\)[`*]|(?<!\\)\]\(|(?<!\\)<[a-z/!]", line)


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+1+1", "'+1+1"),
        ("-1+1", "'-1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "\\u000d=1"),
        ("＝1", "'＝1"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        (-0.5, -0.5),
        (-3, -3),
        ("ppo - dpo", "ppo - dpo"),
        (None, None),
    ],
)
def test_csv_cells_are_no_formulas_and_numbers_stay_numbers(cell, written):
    assert formula_safe_csv_cell(cell) == written


def test_csv_and_json_of_a_table():
    table = Table("t", "T", ["=name", "value"], [["=1+1", -0.5], ["ok", 2]])
    assert list(csv.reader(io.StringIO(table.to_csv()))) == [
        ["'=name", "value"],
        ["'=1+1", "-0.5"],
        ["ok", "2"],
    ]
    assert json.loads(table.to_json())[0] == {"=name": "=1+1", "value": -0.5}


def test_the_page_runs_its_own_script_alone():
    text = page_html("t", "")
    policy = re.search(r"script-src ([^;]+);", text)[1]
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy)


def test_log_lines_show_codes_as_escapes():
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (EVERYTHING,), None)
    assert not CODES.search(SafeLogFormatter("%(message)s").format(record))


def test_error_messages_show_codes_as_escapes(capsys: pytest.CaptureFixture, tmp_path: Path):
    assert main(["report", str(tmp_path / f"no{ESC}[2J\r{RLO}such")]) == 2
    assert not CODES.search(capsys.readouterr().err.replace("\n", ""))


def test_tables_in_a_terminal_show_text_as_it_is():
    shown = table_text([{"name": HOSTILE["rich"]}, {"name": HOSTILE["ansi"]}], ["name"])
    assert HOSTILE["rich"] in shown
    assert ESC not in shown


def test_progress_shows_codes_as_escapes():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system=None, width=300)
    with ProgressDisplay(HOSTILE["ansi"], 2, console=console) as reporter:
        reporter.show(1, {f"reward/{HOSTILE['osc']}": 1.0}, [HOSTILE["return"] + RLO])
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())  # rich's own cursor movements
    for code in ("\x07", "\x9b", RLO, "\b", "]0;owned\x07"):
        assert code not in text
    assert r"\u001b]0;owned" in text
    assert r"\u000dBAD" in text


def test_pages_and_tables_are_written_without_codes(tmp_path: Path):
    for written in pages_of(tmp_path):
        text = written.read_text(encoding="utf-8")
        assert text.count("<script") == 1
        assert not re.search(r"<(img|textarea|a href=.javascript)", text)
        assert not CODES.search(text)
    report = (tmp_path / "judged" / "evaluation" / "pairs" / "report.md").read_text()
    assert not CODES.search(report)
    assert "<script" not in report.replace(r"\<script", "")
    table = (tmp_path / "runs" / "report_tables" / "curves.csv").read_text()
    assert not CODES.search(table)


def test_comparison_in_markdown_shows_codes_as_escapes(tmp_path: Path):
    text = compare([hostile_pipeline(tmp_path / "runs")]).to_markdown()
    assert not CODES.search(text)
