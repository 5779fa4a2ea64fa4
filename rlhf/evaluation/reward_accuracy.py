"""Compare rewards by their accuracy on preference pairs, as policies are compared by episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.common.files import read_log
from rlhf.errors import UserError
from rlhf.evaluation.pairs import PAIR_SCORE_COLUMNS, PAIR_SCORES_FILE
from rlhf.evaluation.records import Evaluation, RunRecord

ACCURACY = "accuracy"
"""Name of the metric: 1 if the chosen reply of a pair has the higher score, 0.5 for a tie, else
0."""
_SETTING = {"env": "preference pairs", "decoding": ""}


@dataclass(frozen=True)
class RewardAccuracyRuns:
    """Runs of rewards whose evaluated pairs are episodes with the metric `ACCURACY`."""

    runs: list[RunRecord]
    notes: list[str]
    """Caveats, and descriptions of omitted pairs."""


def as_reward_accuracy_runs(runs: Sequence[RunRecord]) -> RewardAccuracyRuns | None:
    """Return the runs of several rewards that have scored preference pairs.

    The result is None if a run has episodes, or if fewer than two runs have scores of pairs. Only
    the pairs that all rewards have scored are used. The independent units are prompts.

    Raises:
        UserError: The rewards have no common pair.
    """
    if any(evaluation.episodes for run in runs for evaluation in run.evaluations):
        return None
    scored = [(run, rows) for run in runs if (rows := _pair_scores(run))]
    if len(scored) < 2:
        return None
    common = set.intersection(*({row["pair"] for row in rows} for _, rows in scored))
    if not common:
        names = " and ".join(run.name for run, _ in scored)
        raise UserError(
            f"{names} have no preference pair in common, so their accuracies cannot be compared: "
            "evaluate them on the same data with rlhf reward-report"
        )
    notes = ["every prompt has the same weight in the accuracy, whatever its number of pairs"]
    most = max(len({row["pair"] for row in rows}) for _, rows in scored)
    if len(common) < most:
        notes.append(f"only the {len(common)} of {most} pairs that all rewards scored are compared")
    return RewardAccuracyRuns(
        [_with_pairs_as_episodes(run, rows, common) for run, rows in scored], notes
    )


def _pair_scores(run: RunRecord) -> list[dict[str, Any]]:
    """Return the scored pairs of the first evaluation of a run that has some; [] if none has."""
    files = (run.directory / "evaluation" / e.name / PAIR_SCORES_FILE for e in run.evaluations)
    return next((rows for file in files if (rows := read_log(file, PAIR_SCORE_COLUMNS))), [])


def _with_pairs_as_episodes(
    run: RunRecord, rows: Sequence[Mapping[str, Any]], pairs: set[str]
) -> RunRecord:
    """Return a run whose only evaluation has an episode for each of the given pairs."""
    by_pair = {row["pair"]: row for row in rows if row["pair"] in pairs}
    episodes = [
        {
            **_SETTING,
            "seed": index,
            "prompt_id": by_pair[pair]["prompt"],
            "components": {ACCURACY: by_pair[pair]["correct"]},
        }
        for index, pair in enumerate(sorted(by_pair))
    ]
    # The method is named after the run, not after policies that the configuration may list.
    config = {key: value for key, value in run.config.items() if key != "policies"}
    evaluation = Evaluation(run.name, {**_SETTING, "policy": run.name, "metrics": {}}, episodes)
    return replace(run, config=config, evaluations=[evaluation])
