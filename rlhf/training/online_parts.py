"""Declare the parts of the online trainer that batches, updates and evaluations use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.controllers import FixedKL, LagrangeMultiplier
from rlhf.config.online import OnlineConfig
from rlhf.models.policy import Policy, ReferencePolicy
from rlhf.rollout.collector import Collector
from rlhf.rollout.items import SeenOpenings
from rlhf.runs.profiling import Stopwatch
from rlhf.training.collection import StepCollector
from rlhf.training.trainer import Trainer


class OnlineTrainerParts(Trainer):
    """Declares the parts of `rlhf.training.online.OnlineTrainer`, which sets them."""

    config: OnlineConfig
    algorithm: Algorithm
    policy: Policy
    reference: ReferencePolicy | None
    """The reference of the KL; None if the algorithm has none."""
    rewards: Any
    """The rewards that are trained on; None if there are none."""
    monitor_rewards: Any
    """Rewards that are only logged; None if there are none."""
    kl: FixedKL
    """The controller of the KL coefficient."""
    multiplier: LagrangeMultiplier | None
    """The multiplier of a constrained algorithm; None for other algorithms."""
    stopwatch: Stopwatch
    step_collector: StepCollector
    """Collects and scores the episodes of training."""
    eval_collector: Collector
    """Collects held-out episodes."""
    openings: SeenOpenings
    """The first messages of the episodes of training."""
    max_episode_tokens: int
    """Maximum number of sampled tokens of an episode."""

    @property
    def all_rewards(self) -> list[Any]:
        """The rewards that are trained on and the rewards that are only logged."""
        return [r for r in (self.rewards, self.monitor_rewards) if r is not None]

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Return a context manager in which this process holds the whole policy, to sample."""
        with contextlib.ExitStack() as stack:
            with self.world.lost_process_guard():
                stack.enter_context(self.policy.whole_weights())
            yield
