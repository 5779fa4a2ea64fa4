"""Markdown pages of reports on rewards: on pairs, on labelled texts, and on benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_report(directory: Path, summary: Mapping[str, Any], page: str) -> None:
    """Write ``evaluation/<name>/summary.json`` and ``report.md`` into a run directory."""
    folder = directory / "evaluation" / summary["name"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(page, encoding="utf-8")


def pairs_page(report: Mapping[str, Any]) -> str:
    """Return the report on pairs as Markdown: findings, then one table for each measurement."""
    data, length = report["data"], report["length"]
    parts = [
        f"# Reward report: {report['reward']}",
        "## Verdict\n\n" + "\n".join(f"- {line}" for line in report["verdict"]),
        f"## Accuracy\n\n{percent(report['accuracy'])} on {data['pairs']} pairs of "
        f"{data['prompts']} prompts; {data['ties']} ties (counted half), "
        f"{data['unscored']} unscored (left out).",
        _table(
            ["baseline", "its accuracy", "gain over it"],
            [
                [name, percent(b["accuracy"]), percent(b["gain"])]
                for name, b in report["baselines"].items()
            ],
        ),
        "## By size of the margin\n\n" + _quantile_table(report["by_margin"]),
        "## By length gap (chosen minus rejected, characters)\n\n"
        + _quantile_table(report["by_length_gap"]),
    ]
    if report["by_source"]:
        rows = [[name, str(i["n"]), percent(i)] for name, i in report["by_source"].items()]
        parts.append("## By source\n\n" + _table(["source", "pairs", "accuracy"], rows))
    parts += [
        "## Calibration\n\n" + _calibration_table(report["calibration"]),
        "## Length\n\n"
        f"Rank correlation of score and length {_correlation(length)}; accuracy where "
        f"lengths differ by at most 10%: {percent(length['matched_accuracy'])}.",
    ]
    if report["invariance"]:
        changes = report["invariance"]
        rows = [[kind, f"{changes[kind]:.2g}"] for kind in ("batch", "order", "padding")]
        head = ["condition", "largest change of a score"]
        parts.append(f"## Invariance\n\n{changes['texts']} texts.\n\n" + _table(head, rows))
    if report["stress"]:
        rows = [
            [name, s["expect"], _interval(s["change"]), f"{s['fell']:.0%}", _mark(s["passed"])]
            for name, s in report["stress"].items()
        ]
        head = ["change to the chosen reply", "should", "score change (std)", "fell", "passed"]
        parts.append("## Stress tests\n\n" + _table(head, rows))
    if report["policy"]:
        policy = report["policy"]
        parts.append(
            f"## On the policy's own replies\n\nMean {_number(policy['mean'])}, standard deviation "
            f"{_number(policy['std'])}, within a prompt {_number(policy['within_prompt_std'])}."
        )
    if chosen := report.get("best_of_n"):
        parts.append("## Best of n\n\n" + _best_of_n_table(chosen))
    parts.append("## Data\n\n" + _table(["what", "how many"], data_rows(data)))
    return "\n\n".join(parts) + "\n"


def labelled_page(name: str, report: Mapping[str, Any]) -> str:
    """Return the report on labelled texts as Markdown: the model, baselines, and gains."""
    measures = list(report["metrics"])
    rows = {"this model": report["metrics"], **report["baselines"]}
    rows |= {f"gain over {baseline}": gain for baseline, gain in report["gains"].items()}
    cells = [
        [label, *(_estimate(values[m]) if m in values else "" for m in measures)]
        for label, values in rows.items()
    ]
    size = f"{report['rows']:,} held-out rows of {report['units']:,} units; 95% intervals."
    return "\n\n".join([f"# {name}", size, _table(["", *measures], cells)]) + "\n"


def benchmark_page(name: str, reward: str, result: Mapping[str, Any]) -> str:
    """Return the result of a public benchmark as Markdown."""
    rows = []
    for part, value in benchmark_parts(result):
        ends = result["intervals"].get(part, {})
        known = ends.get("low") is not None
        bounds = f"[{ends['low']:.3f}, {ends['high']:.3f}]" if known else ""
        rows.append([part, f"{value:.3f}", bounds, str(ends.get("prompts", ""))])
    parts = [f"# {name}: {reward}", _table(["part", "score", "95% interval", "prompts"], rows)]
    if result.get("absent"):
        absent = ", ".join(result["absent"])
        parts.append(f"The file has no rows of {absent}; the score is not the published one.")
    return "\n\n".join(parts) + "\n"


def benchmark_parts(result: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the scores of a benchmark's result; nested ones are named ``section / part``."""
    rows: list[tuple[str, float]] = []
    for key, value in result.items():
        if not prefix and key in ("intervals", "rows", "absent"):
            continue
        if isinstance(value, Mapping):
            rows += benchmark_parts(value, f"{prefix}{key} / ")
        else:
            rows.append((prefix + str(key), float(value)))
    return rows


def data_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """Return the data card as rows of (what, how many), without unknown numbers."""
    known = {
        "pairs": data["pairs"],
        "prompts": data["prompts"],
        "exact ties of the score": data["ties"],
        "unscored pairs": data["unscored"],
        "duplicate pairs": data["duplicates"],
        "pairs that another contradicts": data["contradictions"],
        "training pairs": data["training_pairs"],
        "prompts that are in the training pairs": data["prompts_in_training"],
        "prompts that share 13 words with them": data.get("overlapping"),
        **{f"left out: {reason}": count for reason, count in data["dropped"].items()},
        **{f"event: {name}": count for name, count in data["counts"].items()},
        **{f"from {name}": count for name, count in data["sources"].items()},
        **{f"median characters, {k}": v for k, v in data["median_characters"].items()},
    }
    return [[name, f"{value:,.0f}"] for name, value in known.items() if value is not None]


def _best_of_n_table(chosen: Mapping[str, Any]) -> str:
    rows = [
        [str(n), f"{kl:.2f}", _number(proxy["mean"]), _bounds(gold)]
        for n, kl, proxy, gold in zip(
            chosen["ns"], chosen["kl"], chosen["proxy_score"], chosen["gold"], strict=True
        )
    ]
    return _table(["n", "KL (nats)", "this reward (std)", "gold"], rows)


def _bounds(point: Mapping[str, Any]) -> str:
    if point["low"] is None:
        return _number(point["mean"])
    return f"{_number(point['mean'])} [{_number(point['low'])}, {_number(point['high'])}]"


def _quantile_table(rows: list[Mapping[str, Any]]) -> str:
    cells = [
        [
            f"{_number(r['from'])} to {_number(r['to'])}",
            str(r["accuracy"]["n"]),
            percent(r["accuracy"]),
        ]
        for r in rows
    ]
    return _table(["range", "pairs", "accuracy"], cells)


def _calibration_table(calibration: Mapping[str, Any]) -> str:
    columns = ("temperature", "nll", "brier", "ece")
    rows = [
        [name, *(_number(calibration[key][column]) for column in columns)]
        for name, key in (("as given", "as_given"), ("fitted", "fitted"))
    ]
    return _table(["temperature", "value", "NLL (coin 0.693)", "Brier (coin 0.25)", "ECE"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def _interval(interval: Mapping[str, Any]) -> str:
    if not has_interval(interval):
        return _number(interval["value"])
    return f"{interval['value']:+.2f} [{interval['low']:+.2f}, {interval['high']:+.2f}]"


def _correlation(length: Mapping[str, Any]) -> str:
    ends = length.get("spearman_interval")  # reports of 0.1.0 have none
    text = _number(length["spearman"], 2)
    if not ends or not has_interval(ends):
        return text
    return f"{text} [{ends['low']:.2f}, {ends['high']:.2f}]"


def _mark(passed: bool | None) -> str:
    return {True: "yes", False: "no", None: "undecided"}[passed]


def _estimate(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return "undefined"
    if value["low"] is None:
        return f"{value['mean']:.3f} (no interval)"
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def percent(interval: Mapping[str, Any] | None) -> str:
    """Return a share with its interval, in percent."""
    if interval is None or interval["value"] is None:
        return "unknown"
    if not has_interval(interval):
        return f"{interval['value']:.1%} (too few prompts for an interval)"
    return f"{interval['value']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def has_interval(interval: Mapping[str, Any]) -> bool:
    """Whether both ends are known; without an interval they are None or nan."""
    low = interval["low"]
    return low is not None and math.isfinite(low)
