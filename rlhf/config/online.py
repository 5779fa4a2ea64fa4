"""Configuration of online reinforcement learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.algorithms.registry import ALGORITHMS, Algorithm, configured_algorithm
from rlhf.algorithms.settings import Settings
from rlhf.common.ranges import (
    Finite,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProperFraction,
)
from rlhf.common.reward_spec import RewardSpec
from rlhf.config.base import TrainingConfig
from rlhf.config.model import LoraSpec
from rlhf.config.optimization import OptimizerName
from rlhf.config.rollout import EnvSpec, OnlineRolloutSpec
from rlhf.errors import UserError


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer with float32 state, gradient clipping, and a learning rate schedule."""

    name: OptimizerName = "adamw"
    """adamw, or sgd (without momentum), which needs no memory for moments. Plug-ins can add
    optimizers."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    eps: PositiveFloat = 1e-5
    """Adam's epsilon; 1e-5 as in the N+ implementation details (Huang et al. 2024)."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum global norm of the gradients; larger gradients are scaled down to this norm."""
    warmup_steps: NonNegativeInt = 0
    """Number of optimizer steps in which the learning rate increases linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up. linear and cosine decrease it to 0 at the last step."""

    def __post_init__(self) -> None:
        if self.name == "sgd" and self.eps != OptimizerSpec.eps:
            raise ValueError("optimizer.eps has no effect with optimizer.name sgd")


@dataclass(frozen=True)
class KLSpec:
    """Controller of the KL coefficient, which starts at ``algorithm.kl_coef``."""

    controller: Literal["fixed", "adaptive", "budget"] = "fixed"
    """fixed: constant coefficient; adaptive: changes the coefficient so that the KL approaches
    ``target``; budget: constant coefficient, and training ends if the KL exceeds ``target``."""
    target: PositiveFloat = 6.0
    """KL in nats per episode: the target of the adaptive controller, or the limit of budget."""
    horizon: PositiveInt = 10_000
    """Number of episodes over which the adaptive controller changes the coefficient by a factor of
    at most about 1.2."""


@dataclass(frozen=True)
class RewardShaping:
    """Scaling of the score of an episode, and penalties that are subtracted after scaling."""

    scale: Literal["none", "std", "normalize"] = "none"
    """Scaling of the scores. std: divide by the running standard deviation; normalize: subtract the
    running mean and divide by the running standard deviation."""
    clip: PositiveFloat = 10.0
    """Scaled scores are clipped to the interval [-clip, clip]."""
    missing_eos_penalty: Finite = 0.0
    """Number that is subtracted from the score if the last completion has no stop token."""
    length_penalty: Finite = 0.0
    """Number that is subtracted from the score for each sampled token."""
    max_unscored: Fraction = 0.2
    """Maximum fraction of episodes without a score. If the fraction in a step is larger, the run
    stops with an error."""


@dataclass(frozen=True)
class EvaluationSpec:
    """Evaluation on held-out episodes, whose seeds are never used in training."""

    every: NonNegativeInt = 0
    """Number of steps between evaluations during training. With 0, there is no evaluation during
    training."""
    episodes: PositiveInt = 128
    """Number of episodes of an evaluation. If there are fewer prompts, they are repeated."""
    decoding: Literal["greedy", "sampled"] = "sampled"
    """greedy takes the most likely token; sampled uses rollout.temperature."""
    prompts_fraction: ProperFraction = 0.1
    """Fraction of env.prompts that is held out from training."""


@dataclass(frozen=True)
class OnlineConfig(TrainingConfig):
    """Configuration of `rlhf ppo`, `rlhf grpo`, ... Batch sizes are totals over all processes."""

    env: EnvSpec
    """Source of episodes."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards that are added to the environment's reward; docs/rewards.md lists the kinds."""
    gold: list[RewardSpec] = field(default_factory=list)
    """Rewards that are computed and logged but not used in training, such as a gold score."""
    algorithm: Settings = field(default_factory=Settings)
    """Settings of the algorithm; each algorithm has its own defaults (`rlhf algorithms`)."""
    rollout: OnlineRolloutSpec = field(default_factory=OnlineRolloutSpec)
    """Sampling settings of the policy."""
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    """Optimizer settings."""
    kl: KLSpec = field(default_factory=KLSpec)
    """Controller of the KL coefficient."""
    shaping: RewardShaping = field(default_factory=RewardShaping)
    """Scaling of scores and penalties on them."""
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    """Evaluation on held-out episodes."""
    critic: Literal["shared", "separate"] = "shared"
    """shared: a value head on the policy's transformer; separate: a value head on a copy of the
    transformer."""
    critic_warmup_steps: NonNegativeInt = 0
    """Number of initial training steps in which only the critic is trained."""
    num_steps: PositiveInt = 100
    """Number of training steps; each step collects a batch of rollouts and trains on it."""
    episodes_per_step: PositiveInt = 64
    """Number of episodes per step, over all processes; a multiple of algorithm.group_size."""
    micro_batch_tokens: PositiveInt = 8192
    """Maximum number of tokens of a micro-batch in an update. Padding counts, unless the rows are
    packed. A longer episode is a micro-batch of its own."""
    save_every: PositiveInt = 10
    """Number of training steps between checkpoints."""
    keep_best: bool = False
    """Also keep the model of the best evaluation, as checkpoints/best (docs/training.md)."""
    samples_per_step: NonNegativeInt = 2
    """Number of episodes of each training step that are written to samples.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.env.prompts and not self.rewards:
            raise ValueError("rewards: a prompt dataset gives no reward; set at least one reward")
        if not self.rewards and self.env.reward == 0:
            raise ValueError(
                "env.reward is 0 and rewards is empty, so every score is 0: set one of them"
            )
        if self.rollout.temperature == 0:
            raise ValueError(
                "rollout.temperature must be > 0 in training: greedy decoding does not explore"
            )
        for name in self.rollout.active_sampling_filters:
            raise ValueError(
                f"rollout.{name} cannot be used in training: excluded tokens have probability 0 in "
                "the sampler but not in the trainer, which biases the importance ratio; lower "
                f"rollout.temperature instead (rlhf evaluate and generate allow rollout.{name})"
            )
        if self.rollout.engine.kind == "vllm" and self.model.lora is not None:
            self._check_served_adapter(self.model.lora)
        self._check_ineffective_keys()

    def _check_served_adapter(self, lora: LoraSpec) -> None:
        """Raise ValueError if vLLM cannot serve the adapters."""
        for key in ("modules_to_save", "use_dora"):
            if getattr(lora, key):
                raise ValueError(
                    f"model.lora.{key} cannot be used with rollout.engine.kind vllm, because vLLM "
                    "serves only the low-rank updates of an adapter"
                )

    def _check_ineffective_keys(self) -> None:
        """Raise ValueError if a key differs from its default but has no effect."""
        if self.kl.controller == "fixed" and self.kl.target != KLSpec.target:
            raise ValueError("kl.target has no effect with kl.controller fixed")
        if self.kl.controller != "adaptive" and self.kl.horizon != KLSpec.horizon:
            raise ValueError(f"kl.horizon has no effect with kl.controller {self.kl.controller}")
        if self.keep_best and not self.evaluation.every:
            raise ValueError(
                "keep_best has no effect with evaluation.every 0: set the number of steps between "
                "evaluations"
            )
        if self.shaping.scale == "none" and self.shaping.clip != RewardShaping.clip:
            raise ValueError("shaping.clip has no effect with shaping.scale none")
        if (
            not self.env.prompts
            and self.evaluation.prompts_fraction != EvaluationSpec.prompts_fraction
        ):
            raise ValueError(
                "evaluation.prompts_fraction has no effect without env.prompts: held-out episodes "
                "of an environment are selected by their seeds"
            )


def algorithm_of(name: str, config: OnlineConfig) -> Algorithm:
    """Return the algorithm `name` with the settings of a run.

    Raises:
        UserError: The episodes of a step are not a multiple of the group size, a setting is out of
            range, or a setting that differs from its default has no effect.
    """
    algorithm = algorithm_with_settings(name, dataclasses.asdict(config.algorithm))
    size = algorithm.settings.group_size
    if config.episodes_per_step % size:
        raise UserError(
            f"episodes_per_step must be a multiple of algorithm.group_size, got "
            f"{config.episodes_per_step} and {size}"
        )
    return algorithm


def algorithm_with_settings(name: str, settings: Mapping[str, Any]) -> Algorithm:
    """Return the algorithm `name` with the given settings.

    Raises:
        UserError: A setting is out of range, or a setting that differs from its default has no
            effect.
    """
    defaults = dataclasses.asdict(ALGORITHMS[name].settings)
    return configured_algorithm(name, **{k: v for k, v in settings.items() if v != defaults.get(k)})
