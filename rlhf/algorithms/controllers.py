"""State that persists between training steps.

It consists of the KL controllers, the Lagrange multiplier and the running moments of the rewards.
The state is saved in checkpoints, so that a resumed run gives the same results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from rlhf.errors import UserError


@dataclass
class CheckpointedNumbers:
    """Base class of dataclasses whose fields are numbers that are saved in checkpoints."""

    def state_dict(self) -> dict[str, float]:
        """Return the fields by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set the fields from a result of `state_dict`."""
        for name in self.state_dict():
            setattr(self, name, state[name])


@dataclass
class FixedKL(CheckpointedNumbers):
    """A constant KL coefficient, and the interface of all KL controllers."""

    coef: float
    """Weight of the KL, in reward per nat."""
    stop: bool = False
    """Whether training must end."""

    def update(self, kl: float, num_episodes: int) -> None:
        """Leave the coefficient unchanged."""

    def use_settings_of(self, configured: FixedKL) -> None:
        """Use the settings of a new controller, and keep the state that a checkpoint contained."""
        self.coef = configured.coef


@dataclass
class AdaptiveKL(FixedKL):
    """A KL coefficient that is increased while the KL is above a target and decreased below it.

    The update is coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * num_episodes / horizon (Ziegler et
    al. 2019, section 2.2; lm-human-preferences). Ziegler et al. use a target of 6 nats per episode,
    a horizon of 10000 episodes and the initial value 0.15.
    """

    target: float = 6.0
    horizon: int = 10_000

    def update(self, kl: float, num_episodes: int) -> None:
        """Update the coefficient with the mean KL of the last episodes, in nats per episode."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * num_episodes / self.horizon

    def use_settings_of(self, configured: FixedKL) -> None:
        """Use the target and the horizon of a new controller, and keep the coefficient."""
        assert isinstance(configured, AdaptiveKL)
        self.target, self.horizon = configured.target, configured.horizon


@dataclass
class StopAtKLBudget(FixedKL):
    """A constant KL coefficient. Training ends when the mean KL per episode exceeds a budget."""

    budget: float = 10.0

    def update(self, kl: float, num_episodes: int) -> None:
        """Set `stop` if the mean KL, in nats per episode, exceeds the budget."""
        self.stop = self.stop or kl > self.budget

    def use_settings_of(self, configured: FixedKL) -> None:
        """Use the coefficient and the budget of a new controller.

        If the budget has increased, training continues although it ended at the smaller budget.
        """
        assert isinstance(configured, StopAtKLBudget)
        super().use_settings_of(configured)
        if configured.budget > self.budget:
            self.stop = False
        self.budget = configured.budget


@dataclass
class LagrangeMultiplier(CheckpointedNumbers):
    """Multiplier of the constraint "mean cost <= limit" (Ray et al. 2019; Dai et al. 2023).

    The logarithm of the multiplier v is updated by gradient ascent, log v += lr * v * (cost -
    limit), and then limited to log `maximum`. The multiplier always stays positive, so it can
    increase again if the constraint is violated later.

    Raises:
        UserError: The initial value is not in (0, `maximum`].
    """

    value: float
    limit: float
    lr: float
    maximum: float

    def __post_init__(self) -> None:
        if not 0 < self.value <= self.maximum:
            raise UserError(
                f"multiplier_init must be in (0, multiplier_max={self.maximum}], got {self.value} "
                "(an update multiplies the value by a factor, so a value of 0 would never change)"
            )

    def update(self, mean_cost: float) -> None:
        """Update the multiplier with the mean cost per episode of the most recent rollouts."""
        log_value = math.log(self.value) + self.lr * self.value * (mean_cost - self.limit)
        self.value = math.exp(min(log_value, math.log(self.maximum)))

    def state_dict(self) -> dict[str, float]:
        """Return only the value; limit, step size and maximum are read from the configuration."""
        return {"value": self.value}


@dataclass
class RunningRewardMoments(CheckpointedNumbers):
    """Mean and variance of all scores since the start of training (Chan et al. 1979)."""

    count: float = 0.0
    """Number of scores."""
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""

    def update(self, scores: Tensor) -> None:
        """Update the moments with scores of any shape; nan (unscored episode) is ignored."""
        scores = scores[~scores.isnan()].double()
        if not scores.numel():
            return
        count, mean = scores.numel(), float(scores.mean())
        squares = float((scores - mean).square().sum())
        total, shift = self.count + count, mean - self.mean
        self.squares += squares + shift * shift * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation of the scores. It is 1 if they are equal or missing."""
        return math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0

    def divide_by_std(self, scores: Tensor, *, clip: float) -> Tensor:
        """Return scores / std, clamped to [-`clip`, `clip`] (PPO-max, Zheng et al. 2023)."""
        return (scores / self.std).clamp(-clip, clip)

    def normalize(self, scores: Tensor, *, clip: float) -> Tensor:
        """Return (scores - mean) / std, clamped to [-`clip`, `clip`]."""
        return ((scores - self.mean) / self.std).clamp(-clip, clip)
