"""Collect and score the rollouts of a training step."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from rlhf.algorithms.advantages import in_group_with_unequal_scores
from rlhf.errors import UserError
from rlhf.rollout.batch import Rollout
from rlhf.rollout.collector import Collector, EpisodeSeed
from rlhf.training.scoring import (
    check_unscored_fraction,
    format_most_common_reasons,
    score_rollouts,
    shaped_rewards,
)

if TYPE_CHECKING:
    from rlhf.training.online import OnlineTrainer

log = logging.getLogger(__name__)

MAX_ROUNDS = 4
"""Maximum number of rounds in which dynamic sampling samples groups to replace uninformative ones.
After the last round, the update uses all informative groups of the step. If there are none, the
update is skipped."""


@dataclass(frozen=True)
class StepRollouts:
    """The rollouts of a training step, with their training rewards."""

    rollouts: list[Rollout]
    rewards: list[list[float]]
    """Training rewards of the tokens of each rollout, after scaling and penalties."""
    metrics: dict[str, float] = field(default_factory=dict)
    skip: bool = False
    """Whether the update is skipped, because the scores within each sampled group are equal."""

    @property
    def returns(self) -> list[float]:
        """The training return of each rollout; nan for rollouts that could not be scored."""
        return [sum(rewards) for rewards in self.rewards]


def collect_step_rollouts(trainer: OnlineTrainer) -> StepRollouts:
    """Collect the rollouts of a step; with dynamic sampling, replace uninformative groups.

    As in DAPO (Yu et al. 2025, section 3.2), a group is informative if its scores differ. The
    scores before scaling and penalties are compared, so a difference in the length penalty alone
    does not count.

    Raises:
        UserError: Every episode failed, or the fraction of episodes without a score exceeds
            ``shaping.max_unscored``.
    """
    settings, config = trainer.algorithm.settings, trainer.config
    wanted = config.episodes_per_step // settings.group_size
    sampled: list[Rollout] = []
    rewards: list[list[float]] = []
    informative: list[int] = []  # indices into sampled
    groups = rounds = sampled_groups = 0
    failures = trainer.collector.workers.calls.failures
    failures.clear()
    while groups < wanted and rounds < MAX_ROUNDS:
        starts = trainer.starts.take(config.seed, wanted - groups, settings.group_size)
        with trainer.whole_weights():
            collected = trainer.world.map(
                starts, lambda shard: collect_and_score(trainer, shard, trainer.collector)
            )
        rounds, sampled_groups = rounds + 1, sampled_groups + wanted - groups
        first, sampled = len(sampled), sampled + collected
        if collected:
            check_unscored_fraction(sampled, limit=config.shaping.max_unscored)
            scores = torch.tensor([rollout.score for rollout in collected], dtype=torch.float64)
            trainer.moments.update(scores)
            rewards += shaped_rewards(collected, trainer.algorithm, config, trainer.moments)
            group_ids = torch.tensor([rollout.group_index for rollout in collected])
            rows = in_group_with_unequal_scores(scores, group_ids).nonzero()[:, 0].tolist()
            informative += [first + row for row in rows]
            groups += len(group_ids[rows].unique())
        if not settings.dynamic_sampling:
            break
    metrics = {}
    if config.env.errors == "count":
        total = sum(trainer.world.gather(failures), Counter())
        metrics["rollout/failed"] = float(total.total())
        if not sampled:
            raise UserError(
                f"the environment failed in every episode: {format_most_common_reasons(total)}"
            )
    if not settings.dynamic_sampling:
        return StepRollouts(sampled, rewards, metrics)
    metrics["rollout/rounds"] = float(rounds)
    metrics["rollout/groups_dropped"] = dropped = float(sampled_groups - groups)
    if not informative:
        log.warning(
            "step %d: the update is skipped, because the scores are equal within each of the %d "
            "groups of %d rounds; use easier or harder tasks, or a larger algorithm.group_size",
            trainer.progress.step + 1,
            dropped,
            rounds,
        )
        return StepRollouts(sampled, rewards, metrics, skip=True)
    rewards = [rewards[index] for index in informative]
    return StepRollouts([sampled[index] for index in informative], rewards, metrics)


def collect_and_score(
    trainer: OnlineTrainer, starts: Sequence[EpisodeSeed], collector: Collector
) -> list[Rollout]:
    """Collect episodes and score them with all rewards, including those that are only logged.

    The result is empty if every episode failed.
    """
    rollouts = collector.collect(starts, allow_empty=True)
    if not rollouts:
        return []  # `collect_step_rollouts` checks the rollouts of all processes
    with trainer.stopwatch("rewards"):
        score_rollouts(
            rollouts,
            rewards=trainer.rewards,
            gold=trainer.monitor_rewards,
            env_weight=trainer.config.env.reward,
        )
    return rollouts
