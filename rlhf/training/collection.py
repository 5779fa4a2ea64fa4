"""Collect and score the rollouts of a training step."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf.algorithms.advantages import in_group_with_unequal_scores
from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.controllers import CheckpointedNumbers, RunningRewardMoments
from rlhf.config.online import OnlineConfig
from rlhf.errors import UserError
from rlhf.rollout.batch import Rollout
from rlhf.rollout.collector import Collector
from rlhf.rollout.episode import EpisodeSeed
from rlhf.rollout.seeds import training_seed
from rlhf.runs.profiling import Stopwatch
from rlhf.training.distributed import World
from rlhf.training.episode_scorer import EpisodeScorer
from rlhf.training.score_metrics import score_metrics
from rlhf.training.scoring import (
    check_unscored_fraction,
    format_most_common_reasons,
    score_rollouts,
    shaped_rewards,
)

log = logging.getLogger(__name__)

MAX_ROUNDS = 4
"""Maximum number of sampling rounds of a step with dynamic sampling. The rounds after the first one
replace uninformative groups. After the last round, the update uses all informative groups of the
step. If there are none, the update is skipped."""


@dataclass
class StartStateCounter(CheckpointedNumbers):
    """Counts the start states that training has used.

    For a prompt dataset, consecutive start states are consecutive prompts of a fixed shuffle.
    """

    count: int = 0

    def take_episode_seeds(self, run_seed: int, groups: int, group_size: int) -> list[EpisodeSeed]:
        """Return the seeds of the next episodes, and advance the counter.

        Args:
            run_seed: Seed of the run.
            groups: Number of groups.
            group_size: Number of episodes of a group, which have the same start state.

        Returns:
            The seeds of ``groups * group_size`` episodes, group by group.
        """
        first, self.count = self.count, self.count + groups
        return [
            EpisodeSeed(training_seed(run_seed, group), group, member)
            for group in range(first, self.count)
            for member in range(group_size)
        ]


@dataclass(frozen=True)
class StepRollouts:
    """The rollouts of a training step, with their training rewards."""

    rollouts: list[Rollout]
    rewards: list[list[float]]
    """Training rewards of the tokens of each rollout, after scaling and penalties."""
    metrics: dict[str, float] = field(default_factory=dict)
    skip: bool = False
    """Whether dynamic sampling skips the update, because the scores within each group are equal."""

    @property
    def returns(self) -> list[float]:
        """The training return of each rollout; nan for rollouts that could not be scored."""
        return [sum(rewards) for rewards in self.rewards]


@dataclass
class StepCollector:
    """Collects and scores the rollouts of training steps, one step after another."""

    config: OnlineConfig
    algorithm: Algorithm
    collector: Collector
    rewards: Any
    """The rewards that are trained on; None if there are none."""
    monitor_rewards: Any
    """Rewards that are only logged; None if there are none."""
    world: World
    starts: StartStateCounter
    """Counts the start states of the episodes."""
    moments: RunningRewardMoments
    """Moments of all scores."""

    @property
    def stopwatch(self) -> Stopwatch:
        """Stopwatch of the collector, which also measures the time of rewards."""
        return self.collector.watch

    def collect(self, step: int) -> StepRollouts:
        """Collect the rollouts of a step; with dynamic sampling, replace uninformative groups.

        As in DAPO (Yu et al. 2025, section 3.2), a group is informative if its scores, before
        scaling and penalties, differ. If dynamic sampling finds no informative group, a warning is
        logged, and the result has ``skip``. The counter of start states and the moments are
        updated.

        Args:
            step: Index of the training step, for messages.

        Raises:
            UserError: Every episode failed, or the fraction of episodes without a score exceeds
                ``shaping.max_unscored``.
        """
        settings, config = self.algorithm.settings, self.config
        wanted = config.episodes_per_step // settings.group_size
        sampled: list[Rollout] = []
        rewards: list[list[float]] = []
        informative: list[int] = []  # indices into sampled
        groups = rounds = sampled_groups = 0
        self.collector.workers.caller.failures.clear()
        while groups < wanted and rounds < MAX_ROUNDS:
            episode_seeds = self.starts.take_episode_seeds(
                config.seed, wanted - groups, settings.group_size
            )
            collected = self.world.map(episode_seeds, self.collect_and_score)
            rounds, sampled_groups = rounds + 1, sampled_groups + wanted - groups
            first, sampled = len(sampled), sampled + collected
            if collected:
                check_unscored_fraction(sampled, limit=config.shaping.max_unscored)
                scores = torch.tensor([rollout.score for rollout in collected], dtype=torch.float64)
                self.moments.update(scores)
                rewards += shaped_rewards(collected, self.algorithm, config, self.moments)
                group_ids = torch.tensor([rollout.group_index for rollout in collected])
                rows = in_group_with_unequal_scores(scores, group_ids).nonzero()[:, 0].tolist()
                informative += [first + row for row in rows]
                groups += len(group_ids[rows].unique())
            if not settings.dynamic_sampling:
                break
        metrics = self._failure_metrics(sampled)
        metrics |= score_metrics(
            sampled,
            reward=self.rewards,
            env_weight=0.0 if config.env.id is None else config.env.reward,
        )
        if not settings.dynamic_sampling:
            return StepRollouts(sampled, rewards, metrics)
        metrics["rollout/rounds"] = float(rounds)
        metrics["rollout/groups_dropped"] = dropped = float(sampled_groups - groups)
        if not informative:
            log.warning(
                "step %d: the update is skipped, because the scores are equal within each of the "
                "%d groups that were sampled in %d rounds; use easier or harder tasks, or a larger "
                "algorithm.group_size",
                step + 1,
                dropped,
                rounds,
            )
            return StepRollouts(sampled, rewards, metrics, skip=True)
        rewards = [rewards[index] for index in informative]
        return StepRollouts([sampled[index] for index in informative], rewards, metrics)

    def _failure_metrics(self, sampled: Sequence[Rollout]) -> dict[str, float]:
        """Return the number of failed episodes as a metric; {} unless ``env.errors`` is count.

        Raises:
            UserError: Every episode failed.
        """
        if self.config.env.errors != "count":
            return {}
        failures = self.collector.workers.caller.failures
        total = sum(self.world.gather(failures), Counter())
        if not sampled:
            raise UserError(
                f"the environment failed in every episode: {format_most_common_reasons(total)}"
            )
        return {"rollout/failed": float(total.total())}

    def collect_and_score(self, episode_seeds: Sequence[EpisodeSeed]) -> list[Rollout]:
        """Collect episodes and score them with all rewards, including those that are only logged.

        The result is empty if every episode failed.
        """
        with EpisodeScorer([self.rewards, self.monitor_rewards]) as scorer:
            rollouts = self.collector.collect(
                episode_seeds, allow_empty=True, on_finish=scorer.submit
            )
            if not rollouts:
                return []  # `_failure_metrics` raises an error if all processes have none
            with self.stopwatch("rewards"):
                score_rollouts(
                    rollouts,
                    rewards=self.rewards,
                    gold=self.monitor_rewards,
                    env_weight=self.config.env.reward,
                    scorer=scorer,
                )
        return rollouts
