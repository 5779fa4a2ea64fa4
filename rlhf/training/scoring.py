"""Scores of rollouts: reward models, scaling and penalties."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from rlhf.algorithms import penalties
from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.controllers import RewardMoments
from rlhf.config.online import OnlineConfig
from rlhf.errors import UserError
from rlhf.rollout.batch import Rollout


def score_rollouts(
    rollouts: Sequence[Rollout], *, rewards: Any, gold: Any, env_weight: float
) -> None:
    """Add the scores of reward models to the rollouts, in place.

    Args:
        rollouts: fresh ones, which carry the environment's own rewards.
        rewards: a reward that is trained on, or None.
        gold: a reward that is only measured, or None.
        env_weight: of the environment's own rewards.
    """
    for rollout in rollouts:
        rollout.components["env"] = rollout.score
        rollout.rewards = [env_weight * reward for reward in rollout.rewards]
    conversations = [rollout.conversation for rollout in rollouts]
    for reward, counts in ((rewards, True), (gold, False)):
        if reward is None:
            continue
        scores = reward.score(conversations)
        for index, rollout in enumerate(rollouts):
            rollout.components |= {name: col[index] for name, col in scores.components.items()}
            if counts:
                rollout.pay(scores.values[index])
                rollout.unscored = scores.reasons[index]
    for rollout in rollouts:
        rollout.unshaped_score = rollout.score


def unscored_reasons(rollouts: Sequence[Rollout], *, most: int = 3) -> str:
    """The commonest reasons why episodes have no score, as ``12 x number: no reference answer``."""
    counts = Counter(
        rollout.unscored or "the environment gave no score"
        for rollout in rollouts
        if math.isnan(rollout.score)
    )
    shown = [f"{count} x {reason}" for reason, count in counts.most_common(most)]
    rest = counts.total() - sum(count for _, count in counts.most_common(most))
    return "; ".join([*shown, *([f"{rest} x other reasons"] if rest else [])])


def refuse_unscored(rollouts: Sequence[Rollout], *, limit: float) -> None:
    """Check the scores of all episodes that a step has sampled.

    Raises:
        UserError: more of them have none than the share ``limit``, ``shaping.max_unscored``; the
            message names the commonest reasons.
    """
    unscored = sum(math.isnan(rollout.score) for rollout in rollouts) / len(rollouts)
    if unscored > limit:
        raise UserError(
            f"{unscored:.0%} of the episodes could not be scored, more than shaping.max_unscored "
            f"= {limit:.0%}: {unscored_reasons(rollouts)}"
        )


def shape_scores(
    rollouts: Sequence[Rollout],
    algorithm: Algorithm,
    config: OnlineConfig,
    moments: RewardMoments,
) -> None:
    """Scale the scores and subtract penalties, in place; the moments take the scores in."""
    shaping = config.shaping
    scores = torch.tensor([rollout.score for rollout in rollouts], dtype=torch.float64)
    moments.update(scores)
    shaped = scores
    if shaping.scale == "std":
        shaped = moments.scale(scores, clip=shaping.clip)
    elif shaping.scale == "normalise":
        shaped = moments.normalise(scores, clip=shaping.clip)
    finished = torch.tensor([rollout.finished for rollout in rollouts])
    lengths = torch.tensor([rollout.num_actions for rollout in rollouts])
    shaped = penalties.missing_eos(shaped, finished, penalty=shaping.missing_eos_penalty)
    shaped = shaped + penalties.length_penalty(lengths, per_token=shaping.length_penalty)
    shaped = shaped + penalties.soft_overlong(
        torch.tensor([rollout.max_turn_length for rollout in rollouts]),
        max_tokens=config.rollout.max_new_tokens,
        fraction=algorithm.settings.overlong_fraction,
    )
    for rollout, before, after in zip(rollouts, scores.tolist(), shaped.tolist(), strict=True):
        if shaping.scale == "none":
            rollout.pay(after - before)
        else:  # scaling acts on the turns' rewards alike; what is left goes on the last token
            factor = 1.0 / moments.std
            rollout.rewards = [factor * reward for reward in rollout.rewards]
            rollout.pay(after - rollout.score)
