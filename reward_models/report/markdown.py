"""Format reports on pairs, on labeled texts and on benchmarks as Markdown pages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.common.files import write_text
from rlhf.common.numbers import decimal_text
from rlhf.common.text import escape_markdown, markdown_table
from rlhf.reward_models.report.tables import Cell, flat_benchmark_scores, report_tables

_YES_NO = {True: "yes", False: "no", None: "undecided"}


def write_evaluation_report(run_directory: Path, summary: Mapping[str, Any], markdown: str) -> None:
    """Write ``summary.json`` and ``report.md`` into ``evaluation/<name>/`` of a run directory.

    ``name`` is the key "name" of ``summary``, and ``markdown`` is the content of ``report.md``.
    """
    folder = run_directory / "evaluation" / summary["name"]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_text(folder / "report.md", markdown)


def pairs_report_markdown(report: Mapping[str, Any]) -> str:
    """Return the report on pairs as Markdown: findings, then one table for each measurement."""
    data = report["data"]
    parts = [
        f"# Reward report: {escape_markdown(str(report['reward']))}",
        "## Verdict\n\n" + "\n".join(f"- {escape_markdown(line)}" for line in report["verdict"]),
        f"## Accuracy\n\nThe accuracy is {percent_with_interval(report['accuracy'])}. The data "
        f"are {data['pairs']} pairs of {data['prompts']} prompts. {data['ties']} of the pairs are "
        f"ties, which count 1/2, and {data['unscored']} could not be scored and are omitted.",
        _table(
            ["baseline", "accuracy of the baseline", "gain over the baseline"],
            [
                [name, percent_with_interval(b["accuracy"]), percent_with_interval(b["gain"])]
                for name, b in report["baselines"].items()
            ],
        ),
    ]
    if report["stress"]:
        rows = [
            [name, s["expect"], s["change"], f"{s['fell']:.0%}", _YES_NO[s["passed"]]]
            for name, s in report["stress"].items()
        ]
        head = ["change to the chosen reply", "expected effect", "score change (std)"]
        head += ["share of scores that fell", "passed"]
        parts.append("## Stress tests\n\n" + _table(head, rows))
    parts += [f"## {t.title}\n\n{_table(t.columns, t.rows)}" for t in report_tables(report)]
    return "\n\n".join(parts) + "\n"


def labeled_report_markdown(name: str, report: Mapping[str, Any]) -> str:
    """Return the report on labeled texts as Markdown: the model, baselines, and gains."""
    measures = list(report["metrics"])
    rows = {"this model": report["metrics"], **report["baselines"]}
    rows |= {f"gain over {baseline}": gain for baseline, gain in report["gains"].items()}
    cells = [[label, *(values.get(m, "") for m in measures)] for label, values in rows.items()]
    size = (
        f"The report is on {report['rows']:,} held-out rows from {report['units']:,} independent "
        "units (such as prompts). The intervals have a confidence level of 95%."
    )
    return "\n\n".join([f"# {escape_markdown(name)}", size, _table(["", *measures], cells)]) + "\n"


def benchmark_result_markdown(name: str, reward: str, result: Mapping[str, Any]) -> str:
    """Return the result of a public benchmark as Markdown."""
    rows = [
        [part, score, score["n"] if isinstance(score, Mapping) else ""]
        for part, score in flat_benchmark_scores(result)
    ]
    parts = [
        f"# {escape_markdown(f'{name}: {reward}')}",
        _table(["part", "score", "prompts"], rows),
    ]
    if result.get("absent"):
        absent = escape_markdown(", ".join(result["absent"]))
        parts.append(
            f"The file has no rows of {absent}, so the score is not comparable with published "
            "scores."
        )
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    return markdown_table(head, [[_cell_text(cell) for cell in row] for row in rows]).rstrip()


def _cell_text(cell: Cell) -> str:
    """Format a cell; an estimate with an interval becomes ``0.750 [0.600, 0.900]``."""
    if cell is None:
        return "unknown"
    if isinstance(cell, Mapping):
        estimate = _cell_text(cell["value"] if "value" in cell else cell["mean"])
        if not has_interval(cell):
            return f"{estimate} (no interval)"
        return f"{estimate} [{decimal_text(cell['low'])}, {decimal_text(cell['high'])}]"
    return decimal_text(cell) if isinstance(cell, float) else str(cell)


def percent_with_interval(interval: Mapping[str, Any] | None) -> str:
    """Format a proportion with its interval in percent; "unknown" if there is no value."""
    if interval is None or interval["value"] is None:
        return "unknown"
    if not has_interval(interval):
        return f"{interval['value']:.1%} (too few prompts for an interval)"
    return f"{interval['value']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def has_interval(interval: Mapping[str, Any]) -> bool:
    """Return whether the ends of an interval are known, that is, neither None nor nan."""
    low = interval["low"]
    return low is not None and math.isfinite(low)
