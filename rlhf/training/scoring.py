"""Compute the scores of rollouts with rewards, scaling and penalties."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf.algorithms import penalties
from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.controllers import RunningRewardMoments
from rlhf.common.score_names import GOLD
from rlhf.config.online import OnlineConfig
from rlhf.errors import UserError
from rlhf.reward_models.core import components_with_value
from rlhf.rollout.batch import Rollout
from rlhf.training.episode_scorer import EpisodeScorer

MAX_REWARD = 1e12
"""Largest absolute reward that is trained on. Squares of larger rewards and their sums over a batch
could exceed the range of float32, and advantages would then be infinite or nan."""


def score_rollouts(
    rollouts: Sequence[Rollout],
    *,
    rewards: Any,
    gold: Any,
    env_weight: float,
    scorer: EpisodeScorer | None = None,
) -> None:
    """Set ``rewards``, ``components`` and ``unscored`` of collected rollouts, in place.

    The score of ``rewards`` is added to the reward of the last sampled token. An episode with a
    reward whose absolute value is above `MAX_REWARD` counts as unscored.

    Args:
        rollouts: Collected episodes, with the rewards of the environment.
        rewards: The reward that is trained on, or None.
        gold: A reward that is only logged, or None.
        env_weight: Weight of the environment's rewards.
        scorer: Scorer to which the episodes were submitted when they ended. By default, all rewards
            are computed now.
    """
    scorer = scorer or EpisodeScorer(())
    for rollout in rollouts:
        rollout.components["env"] = rollout.env_return
        rollout.rewards = [env_weight * reward for reward in rollout.env_rewards]
    for reward, trained in ((rewards, True), (gold, False)):
        if reward is None:
            continue
        scores = scorer.score(reward, rollouts)
        components = scores.components
        if not trained:
            components = components_with_value(reward, scores, GOLD, always=True)
        for index, rollout in enumerate(rollouts):
            rollout.components |= {name: column[index] for name, column in components.items()}
            if trained:
                value = scores.values[index]
                rollout.rewards = rollout.with_terminal_reward(rollout.rewards, value)
                rollout.unscored = scores.reasons[index]
    for rollout in rollouts:
        largest = max(rollout.rewards, key=abs)
        if abs(largest) > MAX_REWARD:
            rollout.rewards = rollout.with_terminal_reward([0.0] * len(rollout.rewards), None)
            rollout.unscored = f"the reward {largest:.3g} is outside ±{MAX_REWARD:g}"


def format_most_common_reasons(counts: Counter[str], seeds: Mapping[str, int] | None = None) -> str:
    """Return the three most common reasons, and the number of other episodes, as text.

    An example is ``12 x number: no reference answer (seed 7)``.

    Args:
        counts: Reason -> number of episodes.
        seeds: Reason -> seed of an episode with this reason.
    """
    listed = counts.most_common(3)
    parts = [
        f"{count} x {reason}" + (f" (seed {seeds[reason]})" if seeds else "")
        for reason, count in listed
    ]
    rest = counts.total() - sum(count for _, count in listed)
    return "; ".join([*parts, *([f"{rest} x other reasons"] if rest else [])])


def check_unscored_fraction(rollouts: Sequence[Rollout], *, limit: float) -> None:
    """Check the fraction of the episodes of a step that could not be scored.

    Args:
        rollouts: All episodes that have been collected in the step.
        limit: ``shaping.max_unscored``, the maximum fraction of episodes without a score.

    Raises:
        UserError: The fraction exceeds the limit; the message names the most common reasons.
    """
    unscored = [r for r in rollouts if math.isnan(r.score)]
    if len(unscored) > limit * len(rollouts):
        reasons = [(r.unscored or "no score", r.seed) for r in unscored]
        counts, seeds = Counter(reason for reason, _ in reasons), dict(reversed(reasons))
        raise UserError(
            f"{len(unscored) / len(rollouts):.0%} of the episodes could not be scored, more than "
            f"shaping.max_unscored = {limit:.0%}: {format_most_common_reasons(counts, seeds)}; "
            "correct the reward so that it returns a number, or raise shaping.max_unscored"
        )


def shaped_rewards(
    rollouts: Sequence[Rollout],
    algorithm: Algorithm,
    config: OnlineConfig,
    moments: RunningRewardMoments,
) -> list[list[float]]:
    """Scale the scores of rollouts and subtract penalties.

    Args:
        rollouts: Scored episodes; they are not modified.
        algorithm: The algorithm, which defines the overlong penalty.
        config: The configuration, with the section ``shaping``.
        moments: Running moments of all scores, including those of ``rollouts``.

    Returns:
        The training rewards of the tokens of each episode. Scaling divides the rewards of all
        tokens by the standard deviation. Penalties, clipping and the subtraction of the mean change
        only the reward of the last sampled token.
    """
    shaping = config.shaping
    scores = torch.tensor([rollout.score for rollout in rollouts], dtype=torch.float64)
    shaped = scores
    if shaping.scale == "std":
        shaped = moments.divide_by_std(scores, clip=shaping.clip)
    elif shaping.scale == "normalize":
        shaped = moments.normalize(scores, clip=shaping.clip)
    stopped = torch.tensor([rollout.stopped for rollout in rollouts])
    lengths = torch.tensor([rollout.num_sampled_tokens for rollout in rollouts])
    shaped = penalties.subtract_missing_eos_penalty(
        shaped, stopped, penalty=shaping.missing_eos_penalty
    )
    shaped = shaped - shaping.length_penalty * lengths
    shaped = shaped + penalties.soft_overlong_penalty(
        torch.tensor([rollout.num_sampled_tokens_in_longest_turn for rollout in rollouts]),
        max_tokens=config.rollout.max_new_tokens,
        fraction=algorithm.settings.overlong_fraction,
    )
    factor = 1.0 if shaping.scale == "none" else 1.0 / moments.std
    rewards = []
    for rollout, target in zip(rollouts, shaped.tolist(), strict=True):
        scaled = [factor * reward for reward in rollout.rewards]
        rewards.append(rollout.with_terminal_reward(scaled, target - sum(scaled)))
    return rewards
