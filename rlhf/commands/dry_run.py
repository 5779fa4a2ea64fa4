"""Implements `--dry-run`, which checks a configuration without training.

It also estimates the memory and the duration of the run. The number of processes is that of the
launcher, or the value of the environment variable WORLD_SIZE.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.common.launcher import launcher_number
from rlhf.common.text import count_text
from rlhf.config.offline import OfflineConfig
from rlhf.config.optimization import native_options
from rlhf.config.reward import RewardConfig
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.training.plan.plan import Parallelism, Plan


def check_config_without_data(command: str, config: Any, *, with_model: bool) -> None:
    """Check the configuration of a training command whose data or rewards do not exist yet.

    Args:
        command: Name of the command.
        config: Its configuration; configurations of other commands are not checked.
        with_model: Whether the model exists. An existing model is loaded, to check that this works.

    Raises:
        UserError: The configuration is invalid, or the model cannot be loaded.
    """
    if command in ALGORITHMS:
        from rlhf.training.online_setup import check_online_config

        _episodes_per_minibatch(config, check_online_config(command, config))
    elif isinstance(config, OfflineConfig):
        from rlhf.training.offline import checked_method_and_engine

        method, engine = checked_method_and_engine(command, config)
        if engine == "native":
            native_options(command, config.trainer, default_learning_rate=method.learning_rate)
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
    """Return a text with the rows, batch size, steps, memory and duration of an offline run.

    The text is "" in all processes but the first.

    Raises:
        UserError: The configuration or the data are invalid.
    """
    from rlhf.training.plan.text import OFFLINE_KEYS

    return _plan_text(describe_offline, command, config, OFFLINE_KEYS)


def plan_online(command: str, config: Any) -> str:
    """Return a text with the rollouts, updates, steps, memory and duration of an online run.

    The text is "" in all processes but the first.

    Raises:
        UserError: The configuration or the data are invalid.
    """
    from rlhf.training.online_setup import check_number_of_processes
    from rlhf.training.plan.text import ONLINE_KEYS

    check_number_of_processes(config, processes=launcher_number("WORLD_SIZE"))
    return _plan_text(describe_online, command, config, ONLINE_KEYS)


def _plan_text(
    describe: Callable[[str, Any, Parallelism], tuple[list[str], Plan]],
    command: str,
    config: Any,
    keys: Mapping[str, str],
) -> str:
    """Return the text of a dry run; "" in all processes but the first.

    While `describe` runs, WORLD_SIZE is unset, because the processes do not communicate.

    Args:
        describe: `describe_offline` or `describe_online`.
        command: Name of the command.
        config: Its configuration.
        keys: `OFFLINE_KEYS` or `ONLINE_KEYS` of `rlhf.training.plan.text`.
    """
    from rlhf.models.precision import default_device
    from rlhf.runs.launch import configure_malloc_to_keep_memory, configure_malloc_to_return_memory
    from rlhf.runs.machine import total_memory_bytes
    from rlhf.training.plan.plan import Parallelism
    from rlhf.training.plan.text import plan_lines

    processes = launcher_number("WORLD_SIZE")
    world_size = os.environ.pop("WORLD_SIZE", None)
    try:
        if launcher_number("RANK") != 0:
            return ""
        shards = processes if config.sharding == "fsdp" else 1
        local = min(processes, launcher_number("LOCAL_WORLD_SIZE"))
        if shards > 1:
            configure_malloc_to_return_memory()  # as in the run; passes take longer
        lines, plan = describe(command, config, Parallelism(processes, shards, local))
        present = total_memory_bytes(default_device())
        lines += plan_lines(plan, device_bytes=present, keys=keys)
        return "\n".join(lines)
    finally:
        configure_malloc_to_keep_memory()
        if world_size is not None:
            os.environ["WORLD_SIZE"] = world_size


def describe_offline(command: str, config: Any, parallelism: Parallelism) -> tuple[list[str], Plan]:
    """Return lines with rows, batch size and steps of an offline run, and its memory and time."""
    from rlhf.training.methods import num_steps, steps_between_evaluations
    from rlhf.training.offline import (
        NATIVE_TRAINERS,
        check_trainer_options,
        checked_method_and_engine,
        load_train_and_eval_rows,
    )
    from rlhf.training.plan.offline import estimate_offline
    from rlhf.training.plan.trl import estimate_trl
    from rlhf.training.streamed_examples import ExampleStream

    method, engine = checked_method_and_engine(command, config)
    train_rows, eval_rows = load_train_and_eval_rows(config, method)
    setup = method.setup(config, train_rows, engine)
    if setup.trainer:
        from rlhf.training.trl.trainer import check_batch_is_divisible

        check_batch_is_divisible(config, processes=parallelism.processes)
    examples, held_out = setup.encode(train_rows, True), setup.encode(eval_rows, False)
    num_rows = 0 if isinstance(examples, ExampleStream) else len(examples)
    check_trainer_options(command, config, method=method, setup=setup, num_rows=num_rows)
    steps = num_steps(config, num_rows)
    lines = [
        f"rows: {f'{num_rows:,}' if num_rows else 'streamed'} for training, "
        f"{len(eval_rows):,} held out" + (f" ({setup.summary()})" if setup.summary() else ""),
        _batch_line(config, parallelism.processes, trl=setup.trainer is not None),
        f"steps: {steps:,}, evaluated every {steps_between_evaluations(config, steps)}",
        _model_line(setup.model),
    ]
    if setup.trainer and not isinstance(examples, ExampleStream):  # TRL cannot stream rows
        plan = estimate_trl(config, setup, examples, num_steps=steps, parallelism=parallelism)
    else:
        options = native_options(
            command, config.trainer, default_learning_rate=method.learning_rate
        )
        trainer = NATIVE_TRAINERS[command](config, options, setup, examples, held_out)
        plan = estimate_offline(trainer, parallelism)
        trainer.close()
    return lines, plan


def _batch_line(config: Any, processes: int, *, trl: bool) -> str:
    """Return a line with the examples of a step of an offline run, and how they are divided."""
    line, size = f"batch: {config.batch_size} examples per step", config.micro_batch_size
    if not trl:
        return f"{line}, in micro-batches of at most {size} x {config.max_length} tokens"
    of_processes = f"{processes} processes x " if processes > 1 else ""
    accumulated = config.batch_size // (size * processes)
    return f"{line} = {size} at once x {of_processes}{accumulated} accumulated"


def describe_online(command: str, config: Any, parallelism: Parallelism) -> tuple[list[str], Plan]:
    """Return lines with rollouts, updates and steps of an online run, and its memory and time."""
    from rlhf.training.online import OnlineTrainer
    from rlhf.training.plan.online import estimate_online

    trainer = OnlineTrainer(command, config)
    settings = trainer.algorithm.settings
    size = settings.group_size
    per_minibatch = _episodes_per_minibatch(config, trainer.algorithm)
    lines = [
        f"rollouts: {count_text(config.episodes_per_step, 'episode')} per step = "
        f"{count_text(config.episodes_per_step // size, 'start state')} x {size}, "
        f"{config.rollout.parallel} decoding together",
        f"updates: {count_text(settings.num_epochs, 'epoch')} x "
        f"{count_text(settings.num_minibatches, 'mini-batch', 'mini-batches')} of "
        f"{count_text(per_minibatch, 'episode')}; micro-batches of "
        f"{config.micro_batch_tokens:,} tokens",
        f"steps: {config.num_steps:,}, {config.num_steps * config.episodes_per_step:,} episodes, "
        f"{config.num_steps * settings.num_epochs * settings.num_minibatches:,} optimizer steps",
        _model_line(trainer.policy.model),
    ]
    try:
        plan = estimate_online(trainer, parallelism)
    finally:
        trainer.close()
    return lines, plan


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


def _model_line(model: Any) -> str:
    """Return a line with the number of parameters of a model."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"model: {_parameter_count_text(total)} parameters, {_parameter_count_text(trained)} "
        f"trained, {dtype} on {model.device.type}"
    )


def _parameter_count_text(number: int) -> str:
    """Format a number of parameters: in millions if it is at least 100,000, otherwise in full."""
    return f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number:,}"
