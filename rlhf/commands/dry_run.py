"""Implements `--dry-run`, which checks a configuration without training and estimates memory."""

from __future__ import annotations

from typing import Any

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.config.offline import OfflineConfig
from rlhf.config.optimization import native_options
from rlhf.config.reward import RewardConfig
from rlhf.errors import UserError


def check_without_data(command: str, config: Any, *, with_model: bool) -> None:
    """Check the configuration of a training command whose data or rewards do not exist yet.

    Args:
        command: Name of the command.
        config: Its configuration; configurations of other commands are not checked.
        with_model: Whether the model exists. An existing model is loaded, to check that this works.

    Raises:
        UserError: The configuration is invalid, or the model cannot be loaded.
    """
    if command in ALGORITHMS:
        from rlhf.training.online_setup import check_config

        _episodes_per_minibatch(config, check_config(command, config))
    elif isinstance(config, OfflineConfig):
        from rlhf.training.offline import (
            check_reserved_options,
            check_streaming,
            engine_of,
            method_of,
        )

        check_reserved_options(config.trainer)
        method = method_of(command, config)
        engine = engine_of(config, native_supported=method.native)
        check_streaming(command, config, engine)
        if engine == "native":
            native_options(command, config.trainer, learning_rate=method.learning_rate)
    else:
        return
    if with_model and isinstance(config, RewardConfig):
        from rlhf.training.reward_models.base import reward_kind_of
        from rlhf.training.reward_models.new_head import load_model_tokenizer_and_pooling

        load_model_tokenizer_and_pooling(reward_kind_of(config))
    elif with_model:
        from rlhf.models.loading import load_model

        load_model(config.model, seed=config.seed)


def plan_offline(command: str, config: Any) -> str:
    """Return a text with the rows, batch size, steps and memory of an offline run.

    Raises:
        UserError: The configuration or the data are invalid.
    """
    from rlhf.training.methods import num_steps, steps_between_evaluations
    from rlhf.training.offline import (
        check_reserved_options,
        check_streaming,
        check_trainer_options,
        engine_of,
        load_train_and_eval_rows,
        method_of,
    )
    from rlhf.training.streamed_examples import ExampleStream

    method = method_of(command, config)
    check_reserved_options(config.trainer)
    engine = engine_of(config, native_supported=method.native)
    check_streaming(command, config, engine)
    train_rows, eval_rows = load_train_and_eval_rows(config, method)
    setup = method.setup(config, train_rows, engine)
    examples = setup.encode(train_rows, True)
    setup.encode(eval_rows, False)
    num_rows = 0 if isinstance(examples, ExampleStream) else len(examples)
    check_trainer_options(command, config, method=method, setup=setup, num_rows=num_rows)
    steps = num_steps(config, num_rows)
    accumulation = config.batch_size // config.micro_batch_size
    copies = 1 if setup.trainer and "ref_model" in setup.trainer.arguments else 0
    lines = [
        f"rows: {f'{num_rows:,}' if num_rows else 'streamed'} for training, "
        f"{len(eval_rows):,} held out" + (f" ({setup.summary()})" if setup.summary() else ""),
        f"batch: {config.batch_size} examples per step = {config.micro_batch_size} at once x "
        f"{accumulation} accumulated",
        f"steps: {steps:,}, evaluated every {steps_between_evaluations(config, steps)}",
        _memory_line(
            setup.model, tokens=config.micro_batch_size * config.max_length, copies=copies
        ),
    ]
    return "\n".join(lines)


def plan_online(command: str, config: Any) -> str:
    """Return a text with the rollouts, updates, steps and memory of an online run.

    Raises:
        UserError: The configuration or the data are invalid.
    """
    from rlhf.training.online import OnlineTrainer

    trainer = OnlineTrainer(command, config)
    settings = trainer.algorithm.settings
    size = settings.group_size
    per_minibatch = _episodes_per_minibatch(config, trainer.algorithm)
    copies = 1 if trainer.reference and not trainer.policy.is_lora else 0
    snapshots = 3 if trainer.policy_copy else 0
    trainer.close()
    lines = [
        f"rollouts: {config.episodes_per_step} episodes per step = "
        f"{config.episodes_per_step // size} start states x {size}, "
        f"{config.rollout.parallel} decoding together",
        f"updates: {settings.num_epochs} epochs x {settings.num_minibatches} mini-batches of "
        f"{per_minibatch} episodes; micro-batches of {config.micro_batch_tokens:,} tokens",
        f"steps: {config.num_steps:,}, {config.num_steps * config.episodes_per_step:,} episodes, "
        f"{config.num_steps * settings.num_epochs * settings.num_minibatches:,} optimizer steps",
        _memory_line(
            trainer.policy.model,
            tokens=config.micro_batch_tokens,
            copies=copies,
            snapshots=snapshots,
        ),
    ]
    return "\n".join(lines)


def _episodes_per_minibatch(config: Any, algorithm: Any) -> int:
    """Return the number of episodes in a mini-batch.

    Raises:
        UserError: The number of mini-batches exceeds the number of episodes.
    """
    count = algorithm.settings.num_minibatches
    if count > config.episodes_per_step:
        raise UserError(
            f"algorithm.num_minibatches must be at most episodes_per_step, got {count} and "
            f"{config.episodes_per_step}"
        )
    return config.episodes_per_step // count


def _memory_line(model: Any, *, tokens: int, copies: int, snapshots: int = 0) -> str:
    """Return a line with the estimated memory of weights, gradients, optimizer and activations.

    Without recomputation, the activations of one token in one layer need about 34 bytes per hidden
    dimension in a 16-bit dtype. This equals 17 values of the model's dtype (Korthikanti et al.
    2022, arXiv:2205.05198, eq. 1 without the attention term).

    Args:
        model: The model to train.
        tokens: Number of tokens of a micro-batch.
        copies: Number of frozen copies of the model, such as the reference model.
        snapshots: Number of copies of the trained weights, for asynchronous rollouts.
    """
    size = max(p.element_size() for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    master_weight = 0 if size == 4 else 4
    state = total * size * (1 + copies) + trained * (size * (1 + snapshots) + master_weight + 8)
    shape = model.config.get_text_config()
    activations = 17 * size * tokens * shape.hidden_size * shape.num_hidden_layers
    contents = "gradients, optimizer" + (" and reference" if copies else "")
    contents += ", copies for rollouts" if snapshots else ""
    return (
        f"memory: about {_bytes_text(state + activations)} = {_bytes_text(state)} for "
        f"{_count_text(total)} parameters ({_count_text(trained)} trained), {contents} + "
        f"{_bytes_text(activations)} for activations of {tokens:,} tokens"
    )


def _count_text(number: int) -> str:
    """Format a number of parameters: in millions if it is at least 100,000, otherwise in full."""
    return f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number:,}"


def _bytes_text(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
