"""Evaluate a reward on held-out preference rows and write a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.data.leakage import indices_with_shared_prompt_ngrams
from rlhf.reward_models.pairs import to_pair
from rlhf.reward_models.report.markdown import pairs_report_markdown, write_evaluation_report
from rlhf.reward_models.report.pairs import evaluate_reward_model


def report_on_pairs(
    reward: Any,
    rows: Sequence[dict[str, Any]],
    directory: Path,
    *,
    name: str,
    train_rows: Sequence[dict[str, Any]] = (),
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a reward on preference rows and write ``evaluation/<name>/`` in `directory`.

    Args:
        reward: The reward.
        rows: Held-out canonical preference rows.
        directory: Run directory.
        name: Name of the folder and of the report.
        train_rows: Rows on which the reward was trained; empty if they are unknown.
        options: Further arguments of `evaluate_reward_model`.

    Returns:
        The result of `evaluate_reward_model`.
    """
    report = evaluate_reward_model(
        reward,
        [to_pair(row, source="source") for row in rows],
        train_pairs=[to_pair(row, source="source") for row in train_rows] or None,
        overlapping=len(indices_with_shared_prompt_ngrams(rows, train_rows))
        if train_rows
        else None,
        **options,
    )
    summary = {"name": name, "env": "pairs", "policy": name, "metrics": {}} | report
    write_evaluation_report(directory, summary, pairs_report_markdown(report))
    return report
