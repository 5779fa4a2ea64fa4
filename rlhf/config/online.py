"""The configuration of an online run; no torch here, so that parsing stays quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.algorithms.registry import Algorithm, configure
from rlhf.config.base import TrainingConfig
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.errors import UserError


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer with float32 state, gradient clipping, and a learning rate schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw; sgd: without momentum, so that it keeps no moments in memory."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    eps: float = 1e-5
    """Adam's epsilon; 1e-5 as in the N+ implementation details (Huang et al. 2024)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls to 0 by the last step."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate must be > 0, got {self.learning_rate}")
        if self.max_grad_norm <= 0:
            raise ValueError(f"optimizer.max_grad_norm must be > 0, got {self.max_grad_norm}")
        if self.name == "sgd" and self.eps != OptimizerSpec.eps:
            raise ValueError("optimizer.eps has no effect with optimizer.name sgd")


@dataclass(frozen=True)
class KLSpec:
    """How the coefficient of the divergence moves; it starts at ``algorithm.kl_coef``."""

    controller: Literal["fixed", "adaptive", "budget"] = "fixed"
    """fixed; adaptive: steers the divergence to ``target``; budget: ends training beyond it."""
    target: float = 6.0
    """Nats per episode: the aim of adaptive, the limit of budget."""
    horizon: int = 10_000
    """Episodes over which the adaptive coefficient may move by a factor of about e."""


@dataclass(frozen=True)
class RewardShaping:
    """What happens to an episode's score before the advantages."""

    scale: Literal["none", "std", "normalise"] = "none"
    """Divide by the running standard deviation, or also subtract the running mean."""
    clip: float = 10.0
    """With a scale: scores are held within this many standard deviations."""
    missing_eos_penalty: float = 0.0
    """Subtracted where the last reply was cut before its stop token."""
    length_penalty: float = 0.0
    """Subtracted per sampled token."""
    max_unscored: float = 0.2
    """Share of episodes that may go without a score before the run stops."""


@dataclass(frozen=True)
class EvaluationSpec:
    """Held-out episodes during and after training; their seeds lie in a block of their own."""

    every: int = 0
    """Steps between evaluations during training; 0 for none."""
    episodes: int = 128
    """Episodes of one evaluation; more than there are held-out prompts repeat them."""
    decoding: Literal["greedy", "sampled"] = "sampled"
    """greedy takes the likeliest token; sampled uses rollout.temperature."""
    prompts_fraction: float = 0.1
    """Share of the prompts of env.prompts that is held out from training."""


@dataclass(frozen=True)
class OnlineConfig(TrainingConfig):
    """One online run: `rlhf ppo`, `rlhf grpo`, ... Batch sizes are global."""

    env: EnvSpec
    """Where episodes come from."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """Rewards added to the environment's own; see docs/rewards.md for the kinds."""
    gold: list[dict[str, Any]] = field(default_factory=list)
    """Rewards that are only measured, beside the trained one: gold or held-out scores."""
    algorithm: dict[str, Any] = field(default_factory=dict)
    """Settings of the algorithm that differ from its row (`rlhf algorithms`)."""
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    """How the policy is sampled."""
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    """How the weights move."""
    kl: KLSpec = field(default_factory=KLSpec)
    """How the divergence's coefficient moves."""
    shaping: RewardShaping = field(default_factory=RewardShaping)
    """Penalties and scaling of scores."""
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    """Held-out episodes."""
    critic: Literal["shared", "separate"] = "shared"
    """A value head on the policy's trunk, or on a trunk of its own."""
    critic_warmup_steps: int = 0
    """First steps that train the critic alone."""
    num_steps: int = 100
    """Batches of rollouts."""
    episodes_per_step: int = 64
    """Episodes in a batch of rollouts, over all processes; a multiple of algorithm.group_size."""
    micro_batch_tokens: int = 8192
    """Tokens (padding included) that go through the model at once in an update."""
    save_every: int = 10
    """Steps between checkpoints; the last one is kept."""
    samples_per_step: int = 2
    """Transcripts kept of each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_steps", "episodes_per_step", "micro_batch_tokens", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.env.prompts and not self.rewards:
            raise ValueError("rewards: a prompt set has no reward of its own; name at least one")
        if not self.rewards and self.env.reward == 0:
            raise ValueError("env.reward is 0 and there are no rewards, so nothing can be learned")
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature must be > 0 in training: greedy never explores")
        for name in self.rollout.truncations:
            raise ValueError(
                f"rollout.{name} is refused in training: tokens that it leaves out have no "
                "probability in the sampler and some in the trainer, which biases the importance "
                "ratio; lower rollout.temperature instead (rlhf evaluate and generate allow it)"
            )
        self._refuse_idle_keys()

    def _refuse_idle_keys(self) -> None:
        """Raise where a key was set that this combination does not read."""
        if self.kl.controller == "fixed" and self.kl.target != KLSpec.target:
            raise ValueError("kl.target has no effect with kl.controller fixed")
        if self.kl.controller != "adaptive" and self.kl.horizon != KLSpec.horizon:
            raise ValueError(f"kl.horizon has no effect with kl.controller {self.kl.controller}")
        if self.shaping.scale == "none" and self.shaping.clip != RewardShaping.clip:
            raise ValueError("shaping.clip has no effect with shaping.scale none")
        if (
            not self.env.prompts
            and self.evaluation.prompts_fraction != EvaluationSpec.prompts_fraction
        ):
            raise ValueError(
                "evaluation.prompts_fraction has no effect without env.prompts: the held-out "
                "episodes of an environment have seeds of their own"
            )


def algorithm_of(name: str, config: OnlineConfig) -> Algorithm:
    """The configured row of an algorithm, checked against the run's own numbers.

    Raises:
        UserError, ValueError: its groups do not fill a step, or its settings cannot be meant.
    """
    algorithm = configure(name, **config.algorithm)
    size = algorithm.settings.group_size
    if config.episodes_per_step % size:
        raise UserError(
            f"episodes_per_step must be a multiple of algorithm.group_size, got "
            f"{config.episodes_per_step} and {size}"
        )
    return algorithm
