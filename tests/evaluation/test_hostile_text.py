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
from rlhf.evaluation.pairs import write_pair_evaluation
from rlhf.reports import write_comparison_report, write_report
from rlhf.reports.markup import Table, esc
from rlhf.reports.page import page_html
from rlhf.reward_models import PerConversationReward
from rlhf.runs.progress import ProgressDisplay
from tests.evaluation import fake_pipeline as fake

ESC, RLO, ISOLATE = "\x1b", "\u202e", "\u2067"
HOSTILE = {
    "script": "</script><script>document.title='owned'</script>",
    "attribute": "\" onmouseover=\"document.title='owned'\" x='",
    "image": "<img src=x onerror=\"document.title='owned'\">",
    "link": "<a href=\"javascript:document.title='owned'\">click</a>",
    "unclosed": "<table><tr><td></div></main><!-- <textarea><style>*{display:none}",
    "section": '<section id="x"><h2>No such section</h2></header>',
    "bidi": f"{RLO}evil{ISOLATE}\u2066",
    "ansi": f"{ESC}[2J{ESC}[31mred{ESC}[0m",
    "osc": f"{ESC}]0;owned\x07{ESC}]8;;http://example.org\x07link\x9b31m",
    "return": "good\rBAD\b\b\b",
    "markdown": "a|b\n| c |`d`[e](javascript:f)![g](h)<b>*i*_j_",
    "formula": '=HYPERLINK("http://example.org","x")',
    "rich": "[bold red]x[/] [/nothing]",
    "surrogate": "\ud800 half",
    "separators": "a\u2028b\u2029c\x85d\x00e",
    "combining": "a" + "\u0335\u0489" * 300,
    "long": "W" * 5000,
}
CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
EVERYTHING = "\n".join(HOSTILE.values())


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


def hostile_pipeline(root: Path) -> Path:
    """Write a pipeline whose replies, prompts, names of metrics and settings are hostile."""
    fake.write_pipeline(root)
    row = {"step": 1, "seed": 9, "score": 1.0}
    rows = [
        {**row, "split": split, "messages": fake.conversation(0, EVERYTHING)}
        for split in ("before", "after")
    ]
    (root / "dpo" / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    metrics = root / "ppo" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {f"reward/{text}": number + k / 9 for k, text in enumerate(HOSTILE.values())}
    metrics.write_text("\n".join(map(json.dumps, lines)) + "\n")
    machine = json.dumps({"command": ["rlhf", *HOSTILE.values()], "versions": {}})
    (root / "ppo" / "environment.json").write_text(machine)
    return root


def reward_report(root: Path) -> Path:
    name = HOSTILE["markdown"] + HOSTILE["script"]
    length = PerConversationReward(lambda c: float(len(c[-1]["content"])), name=name)
    rows = [
        {"prompt": f"{EVERYTHING} {i}?", "chosen": "yes " * (i % 7 + 1), "rejected": "no"}
        for i in range(40)
    ]
    write_pair_evaluation(length, rows, root, name="pairs")
    return root


def pages_of(tmp_path: Path) -> list[Path]:
    root = hostile_pipeline(tmp_path / "runs")
    return [
        write_report(root),
        write_comparison_report([root], tmp_path / "compare.html"),
        write_report(reward_report(tmp_path / "judged")),
    ]


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
