"""Evaluate a reward on held-out preference rows, and write a report and the score of every pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.common.columns import NUMBER, TEXT, Columns
from rlhf.common.files import write_jsonl
from rlhf.data.leakage import indices_with_shared_prompt_ngrams
from rlhf.evaluation.metrics import messages_digest
from rlhf.reward_models.pairs import to_pair
from rlhf.reward_models.report.markdown import pairs_report_markdown, write_evaluation_report
from rlhf.reward_models.report.pairs import ScoredPairs, evaluate_reward_model, win_indicators

PAIR_SCORES_FILE = "pair_scores.jsonl"
"""Name of the file with one line for each scored pair, in the folder of the report."""
PAIR_SCORE_COLUMNS: Columns = {"pair": TEXT, "prompt": TEXT, "correct": NUMBER}
"""Columns of `PAIR_SCORES_FILE` that a comparison of rewards reads, with their types."""


def write_pair_evaluation(
    reward: Any,
    rows: Sequence[dict[str, Any]],
    run_directory: Path,
    *,
    name: str,
    train_rows: Sequence[dict[str, Any]] = (),
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a reward on preference rows and write ``evaluation/<name>/`` in `run_directory`.

    Args:
        reward: The reward.
        rows: Held-out canonical preference rows.
        run_directory: Run directory.
        name: Name of the folder and of the report.
        train_rows: Rows on which the reward was trained; empty if they are unknown.
        options: Further arguments of `evaluate_reward_model`.

    Returns:
        The result of `evaluate_reward_model`.
    """
    pairs = [to_pair(row, source_column="source") for row in rows]
    scored = ScoredPairs(reward, pairs) if pairs else None
    report = evaluate_reward_model(
        reward,
        pairs,
        scored=scored,
        train_pairs=[to_pair(row, source_column="source") for row in train_rows] or None,
        overlapping=len(indices_with_shared_prompt_ngrams(rows, train_rows))
        if train_rows
        else None,
        **options,
    )
    summary = {"name": name, "env": "pairs", "policy": name, "metrics": {}} | report
    write_evaluation_report(run_directory, summary, pairs_report_markdown(report))
    if scored is not None:
        write_jsonl(run_directory / "evaluation" / name / PAIR_SCORES_FILE, pair_score_rows(scored))
    return report


def pair_score_rows(scored: ScoredPairs) -> list[dict[str, Any]]:
    """Return the rows of `PAIR_SCORES_FILE`.

    ``pair`` and ``prompt`` identify the pair and its prompt, and ``correct`` is 1 if the score of
    the chosen reply is higher, 0 if it is lower, and 0.5 for a tie.
    """
    wins = win_indicators(scored.margins)
    return [
        {
            "pair": messages_digest([*pair.chosen, *pair.rejected]),
            "prompt": messages_digest(pair.prompt),
            "score_chosen": float(scored.chosen[i]),
            "score_rejected": float(scored.rejected[i]),
            "margin": float(scored.margins[i]),
            "correct": float(wins[i]),
            "source": pair.source,
            "messages": list(pair.prompt),
            "chosen": list(pair.chosen[len(pair.prompt) :]),
            "rejected": list(pair.rejected[len(pair.prompt) :]),
        }
        for i, pair in enumerate(scored.pairs)
    ]
