"""Configuration of environments and sampling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.common.ranges import (
    Finite,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFraction,
    PositiveInt,
    Seconds,
)
from rlhf.config.data import DataSpec
from rlhf.config.engine import EngineSpec

Concurrency = Literal["auto", "lockstep", "threads", "processes"]
"""Scheduling of the calls of environments, see `EnvSpec`."""


@dataclass(frozen=True)
class EnvSpec:
    """Source of episodes: a gymnasium environment, or a set of prompts."""

    id: str | None = None
    """Gymnasium id ("text/PreferenceBandit-v0"), or code: module:name or file.py:name, where name
    is an id that the module registers, an environment class, or a function that returns an
    environment."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    prompts: list[DataSpec] = field(default_factory=list)
    """Prompt datasets. An episode consists of one prompt and one completion, which is scored by the
    rewards."""
    reward: Finite = 1.0
    """Weight of the reward of the environment. With weight 0, this reward is only logged, as the
    component "env"."""
    errors: Literal["raise", "count"] = "raise"
    """What happens if an environment fails. raise: the run stops, and the error message contains
    the seed; count: the episode is discarded, and the number of discarded episodes is logged."""
    timeout: Seconds | None = None
    """Time limit of a call of the environment, in seconds. A longer call is a failure. By default,
    there is no limit. With a limit and errors: count, the set of discarded episodes depends on the
    speed of the machine."""

    concurrency: Concurrency = "auto"
    """Scheduling of the calls of the environments. lockstep: one after another, while no tokens are
    sampled; threads: each environment has its own thread, so that slow environments do not delay
    other episodes; processes: each environment has its own process, which is killed after
    env.timeout; auto: lockstep for the environments of the toolkit, which are fast, and threads for
    other environments. With threads and processes, the rounding of log-probabilities depends on the
    speed of the machine."""

    def __post_init__(self) -> None:
        if (self.id is None) == (not self.prompts):
            raise ValueError("env: give either env.id or env.prompts")
        if self.prompts and self.kwargs:
            raise ValueError("env.kwargs has no effect with env.prompts")
        if self.prompts and self.reward != 1.0:
            raise ValueError("env.reward has no effect with env.prompts, which have no reward")
        if self.prompts and self.errors != "raise":
            raise ValueError("env.errors has no effect with env.prompts, which cannot fail")
        if self.prompts and self.concurrency != "auto":
            raise ValueError("env.concurrency has no effect with env.prompts")
        if self.prompts and self.timeout is not None:
            raise ValueError("env.timeout has no effect with env.prompts, which cannot fail")


@dataclass(frozen=True)
class RolloutSpec:
    """Sampling settings of a policy."""

    max_new_tokens: PositiveInt = 64
    """Maximum number of sampled tokens per turn. The limit ends the turn but not the episode."""
    max_tokens: PositiveInt | None = None
    """Maximum number of tokens per episode, including the prompt; the default is the context
    length."""
    temperature: NonNegativeFloat = 1.0
    """Divisor of the logits in sampling and in training. It must be at least 0.001, or 0 for greedy
    decoding."""
    top_k: NonNegativeInt = 0
    """Sample only from this number of most likely tokens; 0 means all tokens. Not available in
    training."""
    top_p: PositiveFraction = 1.0
    """Sample only from the smallest set of most likely tokens whose total probability is at least
    this number. Not available in training."""
    min_p: FractionBelowOne = 0.0
    """Sample only from tokens whose probability is at least this fraction of the highest
    probability. Not available in training."""
    parallel: PositiveInt = 64
    """Maximum number of episodes that are played at the same time."""
    chat: bool | None = None
    """Whether to use the model's chat template. By default, the template is used if the model has
    one."""
    separator: str = "\n"
    """Text between turns of a base model."""
    stop: str | None = None
    """Text that ends a turn of a base model, in addition to EOS."""
    system: str | None = None
    """System message that replaces the system message of the environment or prompt. By default, the
    system message is not replaced."""
    invalid: Literal["end", "retry"] = "end"
    """Effect of a completion without a legal action, in environments whose actions are numbers.
    end: the episode ends; retry: the state is unchanged, and the next observation states the range
    of the numbers. The environment does not count the completion as a turn, so `max_tokens` and the
    context length limit the number of retries. Environments with text actions define this effect
    themselves."""
    invalid_reward: Finite = 0.0
    """Reward of a completion without a legal action. This reward should be lower than the return of
    every episode with only legal actions. If steps have a cost, 0 is too high. `rlhf envs check`
    tests whether 0 is too high."""

    def __post_init__(self) -> None:
        if self.chat and self.stop:
            raise ValueError(
                "rollout.stop has no effect with rollout.chat: the template ends turns"
            )
        if 0 < self.temperature < 1e-3:
            raise ValueError(
                f"rollout.temperature: {self.temperature:g} would overflow the logits; use 0 "
                "(greedy) or at least 0.001"
            )

    @property
    def active_sampling_filters(self) -> list[str]:
        """Names of the settings among top_k, top_p and min_p whose values exclude tokens."""
        neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return [name for name, value in neutral.items() if getattr(self, name) != value]


@dataclass(frozen=True)
class OnlineRolloutSpec(RolloutSpec):
    """Sampling settings of a policy in training, and the engine that samples."""

    engine: EngineSpec = field(default_factory=EngineSpec)
    """Rollout engine, which samples the completions."""
    max_staleness: NonNegativeInt = 0
    """Maximum number of updates between the policy that samples a batch and the policy that is
    updated with it. 0: the batch of a step is collected when the step begins. With a larger number,
    batches of later steps are collected while the policy is trained (docs/asynchronous.md)."""
