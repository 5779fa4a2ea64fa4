"""Create the components of an online run from its configuration, and check the configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.algorithms.controllers import (
    AdaptiveKL,
    FixedKL,
    LagrangeMultiplier,
    StopAtKLBudget,
)
from rlhf.algorithms.registry import Algorithm
from rlhf.common.imports import import_object
from rlhf.common.launcher import launcher_number
from rlhf.common.user_code import (
    check_accepts_arguments,
    definition_location_text,
    guarded_call,
)
from rlhf.config.engine import ENGINES
from rlhf.config.online import KLSpec, OnlineConfig, algorithm_of
from rlhf.data.load import load
from rlhf.data.splits import split_by_prompt
from rlhf.errors import UserError
from rlhf.models.architecture import context_length_of
from rlhf.reward_models.chat_template import prompt_with_tools
from rlhf.rollout.environments.workers import resolved_concurrency
from rlhf.rollout.sampling.base import EngineBase
from rlhf.rollout.sampling.checked import CheckedEngine

if TYPE_CHECKING:
    from rlhf.rollout.vllm.engine import VLLMEngine

log = logging.getLogger(__name__)


def check_online_config(name: str, config: OnlineConfig) -> Algorithm:
    """Make the checks that need no model and no environment; return the configured algorithm.

    Raises:
        UserError: A setting is invalid or has no effect; the message names its key.
    """
    algorithm = algorithm_of(name, config)
    if not algorithm.needs_critic:
        for key in ("critic", "critic_warmup_steps"):
            if getattr(config, key) != getattr(type(config), key):
                advantage = algorithm.settings.advantage
                raise UserError(
                    f"{key} has no effect with {name}: advantage {advantage} has no critic"
                )
    if config.kl.controller == "adaptive" and "kl_coef" not in algorithm.settings_with_effect:
        raise UserError(
            f"kl.controller adaptive has no effect with {name}, because kl_placement is none"
        )
    if config.kl.controller == "budget" and not algorithm.needs_reference:
        raise UserError(
            f"kl.controller budget needs a KL, but {name} has kl_placement none; set "
            "algorithm.kl_placement (with algorithm.kl_coef 0, the KL is not penalized)"
        )
    check_number_of_processes(config, processes=launcher_number("WORLD_SIZE"))
    if config.rollout.max_staleness:
        _check_asynchronous_collection(name, config, algorithm)
    return algorithm


def check_number_of_processes(config: OnlineConfig, *, processes: int) -> None:
    """Raise UserError if there are several training processes, but a key needs one."""
    if processes == 1:
        return
    keys = {
        "rollout.max_staleness": config.rollout.max_staleness > 0,
        "rollout.engine.kind vllm": config.rollout.engine.kind == "vllm",
    }
    for key, is_set in keys.items():
        if is_set:
            raise UserError(f"{key} needs a single training process: start rlhf without torchrun")


def _check_asynchronous_collection(name: str, config: OnlineConfig, algorithm: Algorithm) -> None:
    """Check a run that collects rollouts in a thread.

    A warning is logged if the algorithm supports a correction for the age of the rollouts (an
    importance weight or a mask of sequences), but none is configured.

    Raises:
        UserError: env.timeout needs the main thread.
    """
    if config.env.timeout is not None and resolved_concurrency(config.env) == "lockstep":
        raise UserError(
            "env.timeout cannot be used with rollout.max_staleness and env.concurrency lockstep: "
            "set env.concurrency to threads or processes"
        )
    settings = algorithm.settings
    if "tis_cap" in algorithm.settings_with_effect and not (
        settings.tis_cap or settings.masks_sequences
    ):
        log.warning(
            "%s trains on rollouts that are up to %d updates old without a correction; set "
            "algorithm.tis_cap (a common value is 2)",
            name,
            config.rollout.max_staleness,
        )


def published_weights_folder(config: OnlineConfig) -> Path:
    """Return the folder for the published weights of a run with vLLM servers."""
    folder = config.rollout.engine.folder
    return Path(folder) if folder else Path(f"{config.output_dir.rstrip('/')}-engine")


def open_external_engine(config: OnlineConfig, model: Any) -> Any:
    """Return the configured engine if it is not the local engine, and None otherwise.

    An engine whose class the user defined is wrapped with checks (`CheckedEngine`).

    Raises:
        UserError: The engine cannot be used, or a plug-in's engine does not have a required method.
    """
    spec = config.rollout.engine
    factory = import_object(ENGINES.require(spec.kind), what="rollout.engine.kind")
    if factory is None:
        return None
    what = f"rollout.engine.kind {spec.kind}"
    check_accepts_arguments(
        factory,
        (None, None),
        what=what,
        required_signature="engine(model, config, *, option=...), and correct "
        "rollout.engine.options",
        **spec.options,
    )
    with guarded_call(factory, what=what, advice="move slow work out of the constructor"):
        engine = factory(model, config, **spec.options)
    for name, method in vars(EngineBase).items():
        missing = name in ("submit", "poll") and getattr(type(engine), name, None) is method
        if callable(method) and (missing or not callable(getattr(engine, name, None))):
            raise UserError(
                f"{what}{definition_location_text(factory)}: {type(engine).__name__} has no method "
                f"{name}; derive it from rlhf.rollout.sampling.base.EngineBase"
            )
    if type(engine).__module__.partition(".")[0] == "rlhf":
        return engine
    return CheckedEngine(
        engine,
        what=what,
        vocabulary=model.config.get_text_config().vocab_size,
        max_staleness=config.rollout.max_staleness,
    )


def open_vllm_engine(model: Any, config: OnlineConfig) -> VLLMEngine:
    """Return the engine that samples on the configured vLLM servers."""
    spec = config.rollout.engine
    from rlhf.rollout.vllm.engine import VLLMEngine  # the local engine does not need it

    return VLLMEngine(
        model,
        spec,
        folder=published_weights_folder(config),
        context=context_length_of(model),
        temperature=config.rollout.temperature,
        max_requests=config.rollout.parallel,
    )


def load_split_prompts(
    config: OnlineConfig, *, counts: dict[str, Any]
) -> tuple[list[Any], list[Any]]:
    """Return the training and the held-out prompts of ``env.prompts``.

    For a gymnasium environment, the result is two empty lists. Otherwise, the numbers of
    prompts are added to ``counts``.
    """
    if not config.env.prompts:
        return [], []
    loaded = load(config.env.prompts, "prompt", seed=config.seed)
    loaded.log_summary("prompts")
    train, held_out = split_by_prompt(
        loaded.rows, fraction=config.evaluation.prompts_fraction, seed=config.seed
    )
    counts["prompts"] = loaded.counts()
    counts |= {"training_rows": len(train), "held_out_rows": len(held_out)}
    return [prompt_with_tools(row) for row in train], [prompt_with_tools(row) for row in held_out]


def make_kl_controller(spec: KLSpec, coef: float) -> FixedKL:
    """Return the configured KL controller, with the initial coefficient ``coef``."""
    if spec.controller == "adaptive":
        return AdaptiveKL(coef, target=spec.target, horizon=spec.horizon)
    if spec.controller == "budget":
        return StopAtKLBudget(coef, budget=spec.target)
    return FixedKL(coef)


def make_lagrange_multiplier(algorithm: Algorithm) -> LagrangeMultiplier | None:
    """Return the Lagrange multiplier of a constrained algorithm; None for other algorithms."""
    s = algorithm.settings
    if not algorithm.constrained:
        return None
    return LagrangeMultiplier(
        s.multiplier_init, limit=s.cost_limit, lr=s.multiplier_lr, maximum=s.multiplier_max
    )
