"""Build the tables of a report on pairs, for the Markdown page and the HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.common.numbers import decimal_text

Report = Mapping[str, Any]
Cell = str | int | float | Report | None
"""Text, a number, an estimate with its interval as in the report, or None if unknown."""


class ReportTable(NamedTuple):
    """A table with a title."""

    name: str
    """Short name that is used in file names."""
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def report_tables(report: Report) -> list[ReportTable]:
    """Return the tables of a report; ``report`` is a result of `evaluate_reward_model`."""
    tables = [
        _accuracy_by_slice_table(report),
        _calibration_table(report["calibration"]),
        _score_statistics_table(report),
    ]
    if chosen := report.get("best_of_n"):
        columns = ["n", "KL in nats", "this reward (std)", "gold"]
        points = (chosen[key] for key in ("ns", "kl", "proxy_score", "gold"))
        rows = list(zip(*points, strict=True))
        tables.append(ReportTable("best_of_n", "Best of n", columns, rows))
    card = _data_card_rows(report["data"]) if "duplicates" in report["data"] else []
    return [*tables, ReportTable("data", "Data card", ["what", "how many"], card)]


def _accuracy_by_slice_table(report: Report) -> ReportTable:
    """Return the table of accuracies by margin, length gap and source."""
    rows = [("all", "", report["accuracy"])]
    for title, key in (("margin", "by_margin"), ("length gap", "by_length_gap")):
        for part in report[key]:
            ends = f"{decimal_text(part['from'])} to {decimal_text(part['to'])}"
            rows.append((title, ends, part["accuracy"]))
    rows += [("source", name, accuracy) for name, accuracy in report["by_source"].items()]
    if matched := report["length"]["matched_accuracy"]:
        rows.append(("length", "within 10%", matched))
    columns = ["by", "range", "accuracy", "pairs"]
    cells = [[*row, row[-1]["n"]] for row in rows]
    return ReportTable("slices", "Accuracy by slice", columns, cells)


def _calibration_table(calibration: Report) -> ReportTable:
    rows = [
        [name, *(calibration[key][k] for k in ("temperature", "nll", "brier", "ece"))]
        for name, key in (("as given", "as_given"), ("fitted", "fitted"))
    ]
    columns = ["temperature", "value", "NLL (chance 0.693)", "Brier (chance 0.25)", "ECE"]
    return ReportTable("calibration", "Calibration", columns, rows)


def _score_statistics_table(report: Report) -> ReportTable:
    length, changes, policy = report["length"], report.get("invariance"), report.get("policy")
    rows: list[list[Cell]] = [
        ["Pearson correlation of score and length", length["pearson"]],
        # Reports of 0.1.0 have no interval of the rank correlation.
        [
            "rank correlation of score and length",
            length.get("spearman_interval") or length["spearman"],
        ],
        ["rank correlation of margin and length gap", length["margin_spearman"]],
    ]
    if changes:
        kinds = ("batch", "order", "padding")
        rows += [[f"largest change of a score by {kind}", changes.get(kind)] for kind in kinds]
    if policy:
        rows += [
            ["mean on the policy's replies", policy["mean"]],
            ["standard deviation on the policy's replies", policy["std"]],
            ["standard deviation within a prompt", policy["within_prompt_std"]],
        ]
    return ReportTable("scores", "The scores", ["what", "value"], rows)


def _data_card_rows(data: Report) -> list[list[str]]:
    """Return the rows (what, how many) of the data card, without those of unknown numbers."""
    known = {
        "pairs": data["pairs"],
        "prompts": data["prompts"],
        "pairs with equal scores": data["ties"],
        "unscored pairs": data["unscored"],
        "duplicate pairs": data["duplicates"],
        "pairs that also occur with chosen and rejected exchanged": data["contradictions"],
        "training pairs": data["training_pairs"],
        "prompts that are in the training pairs": data["prompts_in_training"],
        "pairs with 13 consecutive words of a training prompt": data.get("overlapping"),
        **{f"dropped: {reason}": count for reason, count in data["dropped"].items()},
        **{f"event: {name}": count for name, count in data["counts"].items()},
        **{f"from {name}": count for name, count in data["sources"].items()},
        **{f"median characters, {k}": v for k, v in data["median_characters"].items()},
    }
    return [[name, f"{value:,.0f}"] for name, value in known.items() if value is not None]


def flat_benchmark_scores(result: Report, prefix: str = "") -> list[tuple[str, Cell]]:
    """Return (name, value) of each score of a benchmark and of the count ``unscored``.

    A score with a known interval has its interval as part of the value. The name of a nested score
    is ``section / part``; ``prefix`` is prepended to all names.
    """
    rows: list[tuple[str, Cell]] = []
    intervals = result.get("intervals", {})  # results of 0.1.0 have none
    for key, value in result.items():
        if key in ("intervals", "rows", "absent"):
            continue
        if isinstance(value, Mapping):
            rows += flat_benchmark_scores({**value, "intervals": intervals}, f"{prefix}{key} / ")
        elif ends := intervals.get(prefix + key):
            rows.append((prefix + key, {"value": value, **ends, "n": ends["prompts"]}))
        else:
            rows.append((prefix + key, float(value)))
    return rows
