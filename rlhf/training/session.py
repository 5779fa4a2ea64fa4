"""Everything an online run holds, loaded and checked before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gymnasium.spaces import Discrete

from rlhf.algorithms.controllers import (
    AdaptiveKL,
    BudgetKL,
    FixedKL,
    LagrangeMultiplier,
    RewardMoments,
)
from rlhf.algorithms.registry import Algorithm
from rlhf.config.online import KLSpec, OnlineConfig, algorithm_of
from rlhf.config.rollout import RolloutSpec
from rlhf.data.load import load
from rlhf.data.splits import split_by_prompt
from rlhf.errors import UserError
from rlhf.models.flops import peak_flops
from rlhf.models.loading import load_model
from rlhf.models.policy import Policy, Reference
from rlhf.models.precision import MasterOptimizer
from rlhf.models.rewards import load_rewards
from rlhf.models.trainable import Movement, warn_of_dropout
from rlhf.rollout.chat_format import prompt_of
from rlhf.rollout.collector import Collector, EpisodeSeed
from rlhf.rollout.items import Openings
from rlhf.rollout.seeds import training_seed
from rlhf.runs.profiling import Stopwatch
from rlhf.training.distributed import World, init_distributed
from rlhf.training.optimizers import OptimizerSettings, make_optimizer, make_scheduler

log = logging.getLogger(__name__)


@dataclass
class EpisodeCounter:
    """Start states handed out so far: the position in the data."""

    count: int = 0

    def state_dict(self) -> dict[str, float]:
        """As plain numbers."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what ``state_dict`` gave."""
        self.count = int(state["count"])

    def take(self, run_seed: int, groups: int, group_size: int) -> list[EpisodeSeed]:
        """The next groups of episodes; a group shares its start state."""
        first, self.count = self.count, self.count + groups
        return [
            EpisodeSeed(training_seed(run_seed, group), group, member)
            for group in range(first, self.count)
            for member in range(group_size)
        ]


@dataclass
class Session:
    """Everything an online run holds."""

    config: OnlineConfig
    algorithm: Algorithm
    policy: Policy
    reference: Reference | None
    collector: Collector
    held_out: Collector
    rewards: Any
    gold: Any
    world: World
    optimizer: MasterOptimizer
    scheduler: Any
    kl: FixedKL
    multiplier: LagrangeMultiplier | None
    movement: Movement
    """Of the policy since the start of the run."""
    moments: RewardMoments = field(default_factory=RewardMoments)
    starts: EpisodeCounter = field(default_factory=EpisodeCounter)
    openings: Openings = field(default_factory=Openings)
    watch: Stopwatch = field(default_factory=Stopwatch)
    peak_flops: float | None = None
    """Operations per second that the machine reaches at best; measured for a profile."""

    def stateful(self) -> dict[str, Any]:
        """State besides weights and optimizer that a resumed run needs."""
        named = {"kl": self.kl, "multiplier": self.multiplier, "moments": self.moments}
        named |= {"starts": self.starts, "openings": self.openings}
        return {name: item for name, item in named.items() if item is not None}

    def close(self) -> None:
        """Close every environment."""
        self.collector.close()
        self.held_out.close()


def open_session(name: str, config: OnlineConfig) -> Session:
    """Load everything a run needs, and check that the pieces fit.

    Raises:
        UserError, ValueError: they do not; the message names the key.
    """
    algorithm = check_config(name, config)
    rewards = load_rewards(config.rewards) if config.rewards else None
    gold = load_rewards(config.gold) if config.gold else None
    prompts, held_out = split_prompts(config)
    model, tokenizer = load_model(config.model, seed=config.seed)
    warn_of_dropout(name, config.model)
    policy = Policy(model, tokenizer, critic=config.critic if algorithm.critic else "none")
    optimizer = make_optimizer(
        config.optimizer.name,
        policy.parameters(),
        OptimizerSettings(
            learning_rate=config.optimizer.learning_rate,
            weight_decay=config.optimizer.weight_decay,
            eps=config.optimizer.eps,
        ),
    )
    updates = config.num_steps * algorithm.settings.num_epochs * algorithm.settings.num_minibatches
    scheduler = make_scheduler(
        config.optimizer.schedule,
        optimizer,
        num_warmup_steps=config.optimizer.warmup_steps,
        num_training_steps=updates,
    )

    watch = Stopwatch()

    def collector(prompts: Sequence[Any], split: str) -> Collector:
        pieces = (model, tokenizer, config.env, config.rollout)
        return Collector.open(*pieces, prompts=prompts, watch=watch, split=split)

    training = collector(prompts, "train")
    _refuse_idle_rollout_keys(config, training)
    log.info(training.chat_format.describe())
    return Session(
        config=config,
        algorithm=algorithm,
        policy=policy,
        reference=Reference(policy) if algorithm.reference else None,
        collector=training,
        held_out=collector(held_out, "test"),
        rewards=rewards,
        gold=gold,
        world=init_distributed(),
        optimizer=optimizer,
        scheduler=scheduler,
        kl=make_controller(config.kl, algorithm.settings.kl_coef),
        multiplier=make_multiplier(algorithm),
        movement=Movement(model),
        watch=watch,
        peak_flops=peak_flops(model.dtype, policy.device) if config.profile else None,
    )


def check_config(name: str, config: OnlineConfig) -> Algorithm:
    """The configured algorithm, and all checks that need neither model nor environment.

    Raises:
        UserError, ValueError: the message names the key.
    """
    algorithm = algorithm_of(name, config)
    _refuse_idle_keys(algorithm, config)
    return algorithm


def _refuse_idle_keys(algorithm: Algorithm, config: OnlineConfig) -> None:
    """Raise where a key was set that this algorithm does not read."""
    name, defaults = algorithm.name, type(config)
    if not algorithm.critic:
        for key in ("critic", "critic_warmup_steps"):
            if getattr(config, key) != getattr(defaults, key):
                raise UserError(f"{key} has no effect with {name}, which has no critic")
    if config.kl.controller == "adaptive" and "kl_coef" not in algorithm.effective:
        raise UserError(f"kl.controller adaptive has no effect with {name}: kl_placement is none")
    if config.kl.controller == "budget" and not algorithm.reference:
        raise UserError(
            f"kl.controller budget needs a divergence to watch, and {name} has kl_placement none: "
            "choose another placement, with algorithm.kl_coef 0 if it should cost nothing"
        )


def _refuse_idle_rollout_keys(config: OnlineConfig, collector: Collector) -> None:
    """Raise where a key of ``rollout`` was set that this model or environment does not read."""
    rollout, defaults = config.rollout, RolloutSpec
    if collector.chat_format.chat:
        for key in ("separator", "stop"):
            if getattr(rollout, key) != getattr(defaults, key):
                raise UserError(f"rollout.{key} has no effect: the chat template ends turns")
    keys = [k for k in ("invalid", "invalid_reward") if getattr(rollout, k) != getattr(defaults, k)]
    if not keys:
        return
    env = collector.make_env()
    discrete = isinstance(env.action_space, Discrete)
    env.close()
    if not discrete:
        raise UserError(
            f"rollout.{keys[0]} has no effect: the environment takes text, and judges replies "
            "itself"
        )


def split_prompts(config: OnlineConfig) -> tuple[list[Any], list[Any]]:
    """Training and held-out prompts of ``env.prompts``; empty for a gymnasium environment."""
    if not config.env.prompts:
        return [], []
    loaded = load(config.env.prompts, "prompt", seed=config.seed)
    log.info("prompts: %s", loaded.summary())
    train, held_out = split_by_prompt(
        loaded.rows, fraction=config.evaluation.prompts_fraction, seed=config.seed
    )
    return [prompt_of(row) for row in train], [prompt_of(row) for row in held_out]


def make_controller(spec: KLSpec, coef: float) -> FixedKL:
    """The KL controller that the configuration names."""
    if spec.controller == "adaptive":
        return AdaptiveKL(coef, target=spec.target, horizon=spec.horizon)
    if spec.controller == "budget":
        return BudgetKL(coef, budget=spec.target)
    return FixedKL(coef)


def make_multiplier(algorithm: Algorithm) -> LagrangeMultiplier | None:
    """The Lagrange multiplier of a constrained algorithm."""
    s = algorithm.settings
    if not algorithm.constrained:
        return None
    return LagrangeMultiplier(
        s.multiplier_init, limit=s.cost_limit, lr=s.multiplier_lr, maximum=s.multiplier_max
    )
