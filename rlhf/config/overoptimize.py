"""Configuration of `rlhf overoptimize`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.common.names import did_you_mean
from rlhf.common.ranges import MAX_INT32, NonNegativeFloat, PositiveInt
from rlhf.common.reward_spec import RewardSpec
from rlhf.config.base import RunConfig
from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.errors import UserError

ScoreCombination = Literal["single", "mean", "worst", "uncertainty"]


@dataclass(frozen=True)
class ProxyGrid:
    """Proxy reward models to train.

    An ensemble is trained for each combination of an initial model and a number of pairs.
    """

    bases: list[ModelSpec]
    """Initial models of the proxies, such as models of several sizes. RL uses the proxies of the
    first model."""
    data: list[DataSpec]
    """Preference pairs. A tenth of the prompts is held out to measure the accuracy of the
    proxies."""
    pairs: list[Annotated[int, Interval(ge=10, le=MAX_INT32)]]
    """Numbers of training pairs; RL uses the proxies that are trained with the first number."""
    members: PositiveInt = 3
    """Number of reward models in an ensemble. They are trained with different seeds."""
    training: dict[str, Any] = field(default_factory=dict)
    """Other configuration keys of `rlhf reward`: max_length, batch_size, trainer, ..."""

    def __post_init__(self) -> None:
        if not self.bases or not self.data:
            raise ValueError("proxies: bases and data need at least one entry each")
        if not self.pairs:
            raise ValueError("proxies.pairs: the list is empty; give at least one number")
        if len(set(self.pairs)) < len(self.pairs):
            raise ValueError(f"proxies.pairs: the numbers must differ, got {self.pairs}")


@dataclass(frozen=True)
class BestOfNSpec:
    """Best-of-n over samples of the initial policy.

    The minimum numbers of prompts and samples are required to fit the gold score as a function of
    the KL with confidence intervals.
    """

    prompts: Annotated[int, Interval(ge=3, le=MAX_INT32)] = 48
    """Number of prompts."""
    samples: Annotated[int, Interval(ge=8, le=MAX_INT32)] = 128
    """Number of samples for each prompt, which is also the largest n."""


@dataclass(frozen=True)
class PolicyTrainingSpec:
    """Training of the policy against proxies."""

    algorithm: str = "rloo"
    """Name of an online algorithm (`rlhf algorithms`)."""
    against: list[ScoreCombination] = field(default_factory=lambda: ["single"])
    """Rewards to train against, computed from the scores of the ensemble's members. single: seed s
    uses the score of member s; mean: the mean; worst: the minimum; uncertainty: the mean minus
    ``penalty`` times the variance (Coste et al. 2023, arXiv:2310.02743)."""
    seeds: PositiveInt = 3
    """Number of training seeds for each entry of ``against``. At least three are required to fit
    the gold score as a function of the KL with confidence intervals."""
    measured: PositiveInt = 64
    """Number of episodes per step whose gold score is computed; at most episodes_per_step."""
    training: dict[str, Any] = field(default_factory=dict)
    """Other configuration keys of the online run: num_steps, optimizer, algorithm, ..."""

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            known = did_you_mean(self.algorithm, ALGORITHMS)
            raise UserError(f"rl.algorithm: unknown algorithm {self.algorithm!r}{known}")


@dataclass(frozen=True)
class OveroptimizeConfig(RunConfig):
    """Configuration of `rlhf overoptimize`: a policy, a gold score, and proxies of this score."""

    model: ModelSpec
    """The initial policy."""
    env: EnvSpec
    """Source of prompts; the reward of the environment is not used."""
    gold: list[RewardSpec]
    """Rewards whose weighted sum is the gold score; docs/rewards.md lists the kinds."""
    proxies: ProxyGrid | None = None
    """Reward models to train as proxies."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Existing rewards that are used as the proxy. Set either this key or ``proxies``."""
    penalty: NonNegativeFloat = 0.5
    """Weight of the variance of the members' scores in "uncertainty". The variance is computed from
    scores that are scaled to standard deviation 1."""
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    """Sampling settings of the policy."""
    best_of_n: BestOfNSpec = field(default_factory=BestOfNSpec)
    """Optimization by best-of-n."""
    rl: PolicyTrainingSpec | None = None
    """Optimization by reinforcement learning. By default, only best-of-n is used."""

    def __post_init__(self) -> None:
        if not self.gold:
            raise ValueError("gold: the list is empty; give at least one reward as the gold score")
        if (self.proxies is None) == (not self.rewards):
            raise ValueError(
                "overoptimize: give either proxies (reward models to train) or rewards (an "
                "existing proxy)"
            )
        members = self.proxies.members if self.proxies else 1
        combined = [how for how in (self.rl.against if self.rl else []) if how != "single"]
        if combined and members < 2:
            raise ValueError(
                f"rl.against: {combined[0]!r} needs proxies.members >= 2, got {members}"
            )
