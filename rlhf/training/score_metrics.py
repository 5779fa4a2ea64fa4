"""Metrics of the scores of a training step: their variance, its sources, and the solved episodes.

They show whether the rewards contain a signal that an algorithm can learn from. All scores are
those before scaling and penalties. docs/metrics.md describes the metrics.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from rlhf.algorithms.advantages import SCORE_TOLERANCE
from rlhf.common.conversation import Score
from rlhf.reward_models.core import Reward
from rlhf.rollout.batch import Rollout
from rlhf.runs.learning_checks import VARIANCE_SHARE_PREFIX


def score_metrics(
    rollouts: Sequence[Rollout], *, reward: Reward | None, env_weight: float
) -> dict[str, float]:
    """Return metrics of the scores of all episodes that were sampled in a step.

    The result is empty if no episode has a score.

    Args:
        rollouts: Scored episodes. With dynamic sampling, they include the episodes of the groups
            that are excluded from the update. Episodes without a score are ignored.
        reward: The reward that is trained on, or None.
        env_weight: Weight of the reward of the environment; 0 if it is not trained on.
    """
    all_scores = [rollout.score for rollout in rollouts]
    scores = [score for score in all_scores if not math.isnan(score)]
    if not scores:
        return {}
    scored = [r for r, score in zip(rollouts, all_scores, strict=True) if not math.isnan(score)]
    metrics = {"rewards/std": _std(scores)}
    metrics |= _variance_shares(scored, reward, env_weight)
    solved = [is_solved(rollout, reward) for rollout in scored]
    known = [value for value in solved if value is not None]
    if known:
        metrics["rollout/success"] = float(np.mean(known))
    groups = [rollout.group_index for rollout in scored]
    return metrics | _group_metrics(scores, groups, solved)


def is_solved(rollout: Rollout, reward: Reward | None) -> bool | None:
    """Return whether an episode is solved; None if it is not known.

    The environment's report decides. Without a report, an episode is solved if each term of the
    reward that has two possible values has the larger one.

    Args:
        rollout: A scored episode.
        reward: The reward that is trained on, or None.
    """
    if rollout.success is not None or reward is None:
        return rollout.success
    solved = None
    for term in reward.terms():
        outcomes = _two_possible_values(term)
        if outcomes is not None:
            value = term.value_from_leaf_scores(rollout.components)
            solved = solved is not False and value == max(outcomes)
    return solved


def _two_possible_values(term: Reward) -> tuple[float, float] | None:
    """Return the two possible values of a term of a reward; None if they are not known.

    They are known for a reward with `Reward.outcomes`, also if it is weighted or clipped.
    """
    leaves = term.leaves()
    if len(leaves) != 1 or leaves[0].outcomes is None:
        return None
    first, second = (
        term.value_from_leaf_scores({leaves[0].name: value}) for value in leaves[0].outcomes
    )
    return None if first is None or second is None or first == second else (first, second)


def _variance_shares(
    rollouts: Sequence[Rollout], reward: Reward | None, env_weight: float
) -> dict[str, float]:
    """Return the variance of each term of the score, as a fraction of the sum of the variances.

    The result is empty if the score has only one term, or if no term varies.
    """
    columns: dict[str, list[Score]] = defaultdict(list)
    terms = reward.terms() if reward is not None else ()
    for rollout in rollouts:
        if env_weight:
            columns["env"].append(env_weight * rollout.env_return)
        for term in terms:
            columns[term.name].append(term.value_from_leaf_scores(rollout.components))
    variances = {name: _variance(column) for name, column in columns.items()}
    total = math.fsum(variances.values())
    if len(variances) < 2 or not 0 < total < math.inf:
        return {}
    return {f"{VARIANCE_SHARE_PREFIX}{name}": value / total for name, value in variances.items()}


def _group_metrics(
    scores: Sequence[float], groups: Sequence[int], solved: Sequence[bool | None]
) -> dict[str, float]:
    """Return metrics of the groups that have at least two scored episodes; {} without such groups.

    Args:
        scores: Scores of N episodes.
        groups: Index of the group of each episode, [N].
        solved: For each episode, whether it is solved; None if it is not known.
    """
    rows_of_group: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows_of_group[group].append(row)
    compared = [rows for rows in rows_of_group.values() if len(rows) > 1]
    if not compared:
        return {}
    deviations = [_std([scores[row] for row in rows]) for rows in compared]
    metrics = {
        "groups/std": float(np.mean(deviations)),
        "groups/equal": float(np.mean([deviation == 0 for deviation in deviations])),
    }
    known = [[solved[row] for row in rows] for rows in compared]
    known = [values for values in known if None not in values]
    if known:
        metrics["groups/all_solved"] = float(np.mean([all(values) for values in known]))
        metrics["groups/none_solved"] = float(np.mean([not any(values) for values in known]))
    return metrics


def _std(values: Sequence[float]) -> float:
    """Return the standard deviation; 0 if the values differ only by rounding."""
    low, high = min(values), max(values)
    if high - low <= SCORE_TOLERANCE * max(abs(low), abs(high)):
        return 0.0
    return float(np.std(values))


def _variance(column: Sequence[Score]) -> float:
    """Return the variance of the known values; 0 if there are none."""
    known = [value for value in column if value is not None]
    return _std(known) ** 2 if known else 0.0
