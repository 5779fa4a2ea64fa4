"""Reward models on held-out preference pairs: the report that says whether to trust one.

The HTML of it is drawn with the run's page, by `rlhf.reports`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.data.leakage import overlapping_prompts
from rlhf.reward_models.evaluate import evaluate
from rlhf.reward_models.pairs import to_pair
from rlhf.reward_models.verdict import to_markdown, verdict


def report_on_pairs(
    reward: Any,
    rows: Sequence[dict[str, Any]],
    directory: Path,
    *,
    name: str,
    train_rows: Sequence[dict[str, Any]] = (),
    samples: Sequence[Sequence[Any]] | None = None,
    best_of_n: Mapping[str, Any] | None = None,
    dropped: Mapping[str, int] | None = None,
    stress_size: int = 100,
    invariance_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge a reward on pairs; write ``evaluation/<name>/summary.json`` and ``report.md``.

    Args:
        reward: the reward.
        rows: canonical preference rows that it has not seen.
        directory: of the run.
        name: of the folder.
        train_rows: what the bag-of-words baseline learns from; without them it is cross-fitted.
        samples: conversations of the policy to be trained, a list per prompt.
        best_of_n: reward and gold of the best of n of them, where gold is known.
        dropped: reason -> rows that could not be used.
        stress_size: conversations in each stress test; 0 leaves the tests out.
        invariance_size: conversations scored alone and in company; 0 leaves the test out.
        seed: of resampling and stress tests.

    Returns:
        The report as plain data.
    """
    report = evaluate(
        reward,
        [to_pair(row, source="source") for row in rows],
        train_pairs=[to_pair(row, source="source") for row in train_rows] or None,
        samples=samples,
        dropped=dropped,
        stress_size=stress_size,
        invariance_size=invariance_size,
        seed=seed,
    )
    if train_rows:
        report["data"]["overlapping"] = len(overlapping_prompts(rows, train_rows))
    report["best_of_n"] = best_of_n
    report["verdict"] = verdict(report)
    summary = {"name": name, "env": "pairs", "policy": name, "metrics": {}} | report
    write_report(directory, summary, to_markdown(report))
    return report


def write_report(directory: Path, summary: Mapping[str, Any], page: str) -> None:
    """Write what was found of a reward: ``evaluation/<name>/summary.json`` and ``report.md``."""
    target = directory / "evaluation" / summary["name"]
    target.mkdir(parents=True, exist_ok=True)
    (target / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (target / "report.md").write_text(page, encoding="utf-8")
