"""`--dry-run`: check everything that can be checked without training, and estimate the cost."""

from __future__ import annotations

from typing import Any

from rlhf.config.offline import OfflineConfig
from rlhf.config.online import OnlineConfig
from rlhf.config.optimization import native_options
from rlhf.config.reward import RewardConfig
from rlhf.errors import UserError


def check_without_data(command: str, config: Any, *, with_model: bool) -> None:
    """Check a configuration before its data and rewards exist; load the model if it exists.

    Raises:
        UserError: The run would refuse the configuration.
    """
    if isinstance(config, OnlineConfig):
        from rlhf.training.online_setup import check_config

        _check_updates(config, check_config(command, config))
    elif isinstance(config, OfflineConfig):
        from rlhf.training.offline import check_options, engine_of, method_of

        check_options(config.trainer)
        method = method_of(command, config)
        if engine_of(config, native=method.native) == "native":
            native_options(command, config.trainer, learning_rate=method.learning_rate)
    else:
        return
    if with_model and isinstance(config, RewardConfig):
        from rlhf.training.reward_models.base import kind_of
        from rlhf.training.reward_models.new_head import load_with_new_head

        load_with_new_head(kind_of(config))
    elif with_model:
        from rlhf.models.loading import load_model

        load_model(config.model, seed=config.seed)


def plan_offline(command: str, config: Any) -> str:
    """Return rows, batch, steps and memory of an offline run as text, without training.

    Raises:
        UserError: The run would refuse the configuration.
    """
    from rlhf.training.methods import evaluation_steps, num_steps
    from rlhf.training.offline import (
        check_options,
        check_trainer,
        engine_of,
        load_rows,
        method_of,
    )

    method = method_of(command, config)
    check_options(config.trainer)
    train_rows, eval_rows = load_rows(config, method)
    setup = method.setup(config, train_rows, engine_of(config, native=method.native))
    examples = setup.encode(train_rows, True)
    setup.encode(eval_rows, False)
    check_trainer(command, config, method=method, setup=setup, num_rows=len(examples))
    steps = num_steps(config, len(examples))
    accumulation = config.batch_size // config.micro_batch_size
    copies = 1 if setup.trainer and "ref_model" in setup.trainer.arguments else 0
    lines = [
        f"rows: {len(examples):,} for training, {len(eval_rows):,} held out"
        + (f" ({setup.summary()})" if setup.summary() else ""),
        f"batch: {config.batch_size} examples per step = {config.micro_batch_size} at once x "
        f"{accumulation} accumulated",
        f"steps: {steps:,}, evaluated every {evaluation_steps(config, steps)}",
        _memory(setup.model, tokens=config.micro_batch_size * config.max_length, copies=copies),
    ]
    return "\n".join(lines)


def plan_online(command: str, config: Any) -> str:
    """Return rollouts, updates, steps and memory of an online run as text, without training.

    Raises:
        UserError: The run would refuse the configuration.
    """
    from rlhf.training.online import OnlineTrainer

    trainer = OnlineTrainer(command, config)
    settings = trainer.algorithm.settings
    size = settings.group_size
    per_update = _check_updates(config, trainer.algorithm)
    copies = 1 if trainer.reference and not trainer.policy.is_lora else 0
    trainer.close()
    lines = [
        f"rollouts: {config.episodes_per_step} episodes per step = "
        f"{config.episodes_per_step // size} start states x {size}, "
        f"{config.rollout.parallel} decoding together",
        f"updates: {settings.num_epochs} epochs x {settings.num_minibatches} mini-batches of "
        f"{per_update} episodes; micro-batches of {config.micro_batch_tokens:,} tokens",
        f"steps: {config.num_steps:,}, {config.num_steps * config.episodes_per_step:,} episodes, "
        f"{config.num_steps * settings.num_epochs * settings.num_minibatches:,} optimizer steps",
        _memory(trainer.policy.model, tokens=config.micro_batch_tokens, copies=copies),
    ]
    return "\n".join(lines)


def _check_updates(config: Any, algorithm: Any) -> int:
    """Return the number of episodes in a mini-batch.

    Raises:
        UserError: The number is less than one.
    """
    count = algorithm.settings.num_minibatches
    if count > config.episodes_per_step:
        raise UserError(
            f"algorithm.num_minibatches ({count}) exceeds episodes_per_step "
            f"({config.episodes_per_step})"
        )
    return config.episodes_per_step // count


def _memory(model: Any, *, tokens: int, copies: int) -> str:
    """Estimate the memory of weights, gradients, optimizer, references and activations.

    Activations take about 34 values of the model's dtype per token, layer and unit of width without
    recomputation (Korthikanti et al. 2022, arXiv:2205.05198, eq. 1 without the attention term).
    """
    size = max(p.element_size() for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    master_weight = 0 if size == 4 else 4
    state = total * size * (1 + copies) + trained * (size + master_weight + 8)
    shape = model.config.get_text_config()
    activations = 17 * size * tokens * shape.hidden_size * shape.num_hidden_layers
    contents = "gradients, optimizer" + (" and reference" if copies else "")
    return (
        f"memory: about {_bytes(state + activations)} = {_bytes(state)} for "
        f"{_count(total)} parameters ({_count(trained)} trained), {contents} + "
        f"{_bytes(activations)} for activations of {tokens:,} tokens"
    )


def _count(number: int) -> str:
    """Format a number of parameters in millions or thousands, so that small ones are not 0."""
    return f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number:,}"


def _bytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
