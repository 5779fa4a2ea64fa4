"""Metrics of the rollouts of a training step."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rlhf.errors import UserError
from rlhf.rollout.batch import Rollout


def rollout_metrics(rollouts: Sequence[Rollout], returns: Sequence[float]) -> dict[str, float]:
    """Return metrics of the rollouts of a batch.

    Metrics without a value are omitted. docs/metrics.md describes the metrics.

    Args:
        rollouts: The rollouts of the batch.
        returns: Training return of each rollout; nan if it could not be scored.
    """
    metrics = {
        "reward/mean": _mean_of_known_values(returns),
        "reward/unscored": float(np.mean([math.isnan(value) for value in returns])),
        "rollout/tokens": _mean_of_known_values([r.num_sampled_tokens for r in rollouts]),
        "rollout/turns": _mean_of_known_values([r.num_turns for r in rollouts]),
        "rollout/invalid": _mean_of_known_values([r.invalid for r in rollouts]),
        "rollout/length_limited": _mean_of_known_values([r.num_length_limited for r in rollouts]),
        "rollout/missing_eos": _mean_of_known_values([not r.stopped for r in rollouts]),
        "rollout/truncated": _mean_of_known_values([r.truncated for r in rollouts]),
        "rollout/evasion_gain": _truncated_or_invalid_return_gain(rollouts, returns),
        "rollout/cost": _mean_of_known_values([r.cost for r in rollouts]),
        "rollout/repetition": _mean_of_known_values(
            [repeated_bigram_fraction(r) for r in rollouts]
        ),
    }
    reasons = Counter(unscored_metric_key(r.unscored) for r in rollouts if r.unscored)
    metrics |= {key: count / len(rollouts) for key, count in reasons.items()}
    for name in rollouts[0].components:
        metrics[f"reward/{name}"] = _mean_of_known_values([r.components[name] for r in rollouts])
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def staleness_metrics(rollouts: Sequence[Rollout], *, version: int, limit: int) -> dict[str, float]:
    """Return the mean and the maximum staleness of the sampled tokens.

    The staleness of a token is the number of updates between the policy that sampled it and the
    policy that is trained on it.

    Args:
        rollouts: The rollouts of a batch.
        version: Version of the policy at the start of the update.
        limit: Maximum staleness.

    Raises:
        UserError: A token is older, because the rollout engine uses older weights than it was
            given.
    """
    staleness = [
        version - sampled
        for rollout in rollouts
        for sampled, is_action in zip(rollout.policy_versions, rollout.is_action, strict=True)
        if is_action
    ]
    if max(staleness) > limit:
        raise UserError(
            f"the rollout engine returned tokens of weights that are {max(staleness)} updates old, "
            f"more than rollout.max_staleness {limit}: update the engine's weights in update_policy"
        )
    return {
        "rollout/staleness_mean": float(np.mean(staleness)),
        "rollout/staleness_max": float(max(staleness)),
    }


def repeated_bigram_fraction(rollout: Rollout) -> float:
    """Return the fraction of bigrams of sampled tokens that occurred earlier in the same turn.

    The result is nan if no turn has two consecutive sampled tokens.
    """
    pairs = [
        (first_turn, first, second)
        for first_turn, second_turn, first, second, first_sampled, second_sampled in zip(
            rollout.turn,
            rollout.turn[1:],
            rollout.tokens,
            rollout.tokens[1:],
            rollout.is_action,
            rollout.is_action[1:],
            strict=False,
        )
        if first_sampled and second_sampled and first_turn == second_turn
    ]
    return 1 - len(set(pairs)) / len(pairs) if pairs else math.nan


def unscored_metric_key(reason: str) -> str:
    """Convert the reason of an unscored episode to a metric key ``rewards/unscored/NAME/REASON``.

    The details in parentheses or after a second colon are omitted, because they differ from text to
    text.
    """
    name, _, detail = reason.partition(": ")
    summary = detail.partition(": ")[0].partition(" (")[0].lower()
    summary = re.sub(r"[^a-z]+", "_", summary).strip("_")
    return f"rewards/unscored/{name}/{summary or 'no_score'}"


def _truncated_or_invalid_return_gain(
    rollouts: Sequence[Rollout], returns: Sequence[float]
) -> float:
    """Return the mean return of truncated or invalid rollouts minus that of other rollouts.

    The result is nan if one of the two means is not known.
    """
    by_evasion: dict[bool, list[float]] = {True: [], False: []}
    for rollout, value in zip(rollouts, returns, strict=True):
        by_evasion[rollout.truncated or rollout.invalid > 0].append(value)
    return _mean_of_known_values(by_evasion[True]) - _mean_of_known_values(by_evasion[False])


def _mean_of_known_values(values: Sequence[float | None]) -> float:
    """Return the mean of the values that are neither None nor nan, or nan if there are none."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan
