"""Train with TRL's trainers, or with transformers' trainer.

The trainers are configured only by their public arguments, without subclasses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from rlhf.common.files import add_path_to_write_errors, read_json
from rlhf.common.foreign import user_code_location
from rlhf.common.launcher import launcher_number
from rlhf.config.offline import OfflineConfig
from rlhf.config.optimization import OPTIMIZERS
from rlhf.errors import UserError, first_line
from rlhf.models.adapters import copy_base_and_set_its_path
from rlhf.models.architecture import unwrap_peft
from rlhf.models.precision import default_device
from rlhf.models.trainable import (
    WeightChangeDetector,
    copy_model,
    make_frozen,
    trained_parameters,
)
from rlhf.runs.callbacks import Callbacks
from rlhf.runs.changes import STEP_KEYS
from rlhf.runs.directory import Run
from rlhf.runs.interrupt import StopSignalRecorder
from rlhf.training.checkpoint import raise_if_checkpoint_unfit
from rlhf.training.distributed import World
from rlhf.training.methods import (
    OfflineMethod,
    TrainerSpec,
    TrainingSetup,
    default_logging_interval,
    default_warmup_steps,
    num_steps,
    steps_between_evaluations,
)
from rlhf.training.optimizers import make_optimizer, optimizer_settings, toolkit_optimizer_name
from rlhf.training.reply_samples import write_reply_samples
from rlhf.training.resumption import check_step_count, log_changes
from rlhf.training.trl.callback import CALLBACKS_FILE, RunCallback
from rlhf.training.trl.checkpoints import (
    best_checkpoint_recorded_in,
    remove_incomplete_and_find_last,
)
from rlhf.training.trl.columns import (
    KTOCollator,
    PairCollator,
    dpo_trainer_dataset,
    kto_trainer_dataset,
    sft_trainer_dataset,
)


def causal_trainer_spec(
    command: str, config: OfflineConfig, model: Any, tokenizer: Any, *, max_length: int
) -> TrainerSpec:
    """Return the specification of TRL's trainer for a language model.

    Args:
        command: "sft", "dpo" or "kto".
        config: Configuration of the run.
        model: The model to train.
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of tokens of an example.
    """
    fixed: dict[str, Any] = {"max_length": max_length}
    if command == "sft":
        return TrainerSpec(trl.SFTTrainer, trl.SFTConfig, sft_trainer_dataset, fixed=fixed)
    fixed["remove_unused_columns"] = False  # the collators need these columns
    multiple = padding_multiple(config.trainer.get("pad_to_multiple_of"))
    arguments: dict[str, Any] = {}
    if unwrap_peft(model) is model:
        # Without an explicit reference, TRL loads it from disk and ignores the weights in memory.
        arguments["ref_model"] = make_frozen(copy_model(model))
    if command == "dpo":
        arguments["data_collator"] = PairCollator(tokenizer.pad_token_id, multiple)
        return TrainerSpec(
            trl.DPOTrainer, trl.DPOConfig, dpo_trainer_dataset, arguments, fixed=fixed
        )
    arguments["data_collator"] = KTOCollator(tokenizer.pad_token_id, max_length, multiple)
    return TrainerSpec(trl.KTOTrainer, trl.KTOConfig, kto_trainer_dataset, arguments, fixed=fixed)


def padding_multiple(option: int | str | None) -> int:
    """Return the number of which the width of a batch is a multiple.

    Args:
        option: Value of ``trainer.pad_to_multiple_of``, as TRL's configurations accept it. None and
            "auto" mean 1, because TRL's "auto" is a larger number only on Neuron devices.

    Raises:
        UserError: The value is neither a positive integer, nor "auto", "none" or "null".
    """
    text = str(option).lower()
    if text in ("none", "null", "auto"):
        return 1
    if not text.isdecimal() or int(text) == 0:
        raise UserError(
            f"trainer.pad_to_multiple_of must be a positive integer or auto, got {option!r}"
        )
    return int(text)


def train_with_trainer(
    config: OfflineConfig,
    run: Run,
    *,
    method: OfflineMethod,
    setup: TrainingSetup,
    train_and_eval_sets: tuple[Any, Any],
    callbacks: Callbacks,
) -> tuple[Any, int]:
    """Train ``setup.model`` with ``setup.trainer``.

    Args:
        config: Configuration of the run.
        run: The run directory.
        method: Training method of the command.
        setup: Setup of the run.
        train_and_eval_sets: Training and held-out examples.
        callbacks: Callbacks of the user.

    Returns:
        The model with the lowest held-out loss, and the number of steps that were taken.

    Raises:
        UserError: An option under ``trainer:`` is invalid, a changed setting would have no effect,
            the checkpoints are damaged, or training diverged.
        Interrupted: The user stopped the run.
    """
    assert setup.trainer is not None
    options = make_training_arguments(
        method, setup.trainer, config, run.directory, len(train_and_eval_sets[0])
    )
    if unwrap_peft(setup.model) is not setup.model and run.writes:
        copy_base_and_set_its_path(setup.model, setup.tokenizer, run.directory / "checkpoints")
    with StopSignalRecorder() as stop:
        trained = trained_parameters(setup.model)  # TRL may add a frozen adapter as the reference
        trainer = make_trainer(setup, config, options, *train_and_eval_sets)
        for display in (transformers.PrinterCallback, transformers.ProgressCallback):
            trainer.remove_callback(display)
        callback = RunCallback(
            run,
            stop,
            WeightChangeDetector(setup.model),
            trained,
            callbacks=callbacks,
            tokenizer=setup.tokenizer,
        )
        trainer.add_callback(callback)
        if callback.world.size == 1:
            callback.trainer = trainer
        checkpoint = _find_last_checkpoint(config, run, callback.world)
        configured = num_steps(config, len(train_and_eval_sets[0]))
        if checkpoint:
            _prepare_to_resume(trainer, run, callback, checkpoint, configured=configured)
        else:
            _check_and_record_changes(run, options, done=0, configured=configured)
            _evaluate_initial_model(trainer, run, setup)
        _train_from_checkpoint(trainer, callback, checkpoint)
        stop.number = callback.world.first_not_none(stop.number)
        stop.raise_if_requested(run.directory)
    return trainer.model, trainer.state.global_step


def _find_last_checkpoint(config: OfflineConfig, run: Run, world: World) -> Path | None:
    """Return the last complete checkpoint; None if there is none or the run is not resumed."""
    if not config.resume:
        return None
    directory = run.directory / "checkpoints"
    # Only one process removes damaged checkpoints.
    last = remove_incomplete_and_find_last(directory) if run.writes else None
    return world.first_not_none(last)


def _evaluate_initial_model(trainer: Any, run: Run, setup: TrainingSetup) -> None:
    """Log the held-out loss and replies of the initial model as step 0."""
    run.rewind(-1)
    with option_errors_as_user_errors():
        trainer.evaluate()
    write_reply_samples(
        run, setup.model, setup.tokenizer, setup.prompts, step=0, before_or_after="before"
    )


def _prepare_to_resume(
    trainer: Any, run: Run, callback: RunCallback, checkpoint: Path, *, configured: int
) -> None:
    """Prepare a trainer, the run directory and the user's callbacks for a checkpoint.

    Raises:
        UserError: A changed setting would have no effect, or the best checkpoint is damaged.
    """
    done = int(checkpoint.name.split("-")[1])
    _check_and_record_changes(run, trainer.args, done=done, configured=configured)
    callback.checkpoint = checkpoint
    callback.best = best_checkpoint_recorded_in(checkpoint)
    run.rewind(done)
    if callback.callbacks:
        callback.callbacks.load_state_dict(read_json(checkpoint / CALLBACKS_FILE))
    if callback.callbacks.stopped or done >= configured:
        # With more epochs, the trainer would take a step before it compares the step numbers.
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0


def _train_from_checkpoint(trainer: Any, callback: RunCallback, checkpoint: Path | None) -> None:
    """Train from a checkpoint, or from the start if it is None.

    Raises:
        UserError: The checkpoint does not fit the run, or training diverged.
    """
    try:
        with add_path_to_write_errors(Path(trainer.args.output_dir)):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if checkpoint and not callback.has_begun:
            raise_if_checkpoint_unfit(error, checkpoint, callback.world)
        raise
    finally:
        callback.close()


def _check_and_record_changes(run: Run, options: Any, *, done: int, configured: int) -> None:
    """Check, record and log the changed settings of a resumed run.

    Args:
        run: The run directory.
        options: Training arguments of the trainer.
        done: Number of steps of the checkpoint from which the run continues.
        configured: Number of steps of the configuration.

    Raises:
        UserError: A change would have no effect, or the run has taken more steps already.
    """
    for change in run.changes:
        if change.key.startswith("trainer.") and change.key not in STEP_KEYS:
            raise UserError(
                f"{run.directory} cannot be resumed: {change}, but TRL reads this setting from the "
                "checkpoint: keep the setting, or start a new run"
            )
    check_step_count(run, done=done, configured=configured)
    run.record_changes_and_reopen(done)
    schedule = getattr(options.lr_scheduler_type, "value", options.lr_scheduler_type)
    log_changes(run, done, schedule_depends_on_steps=schedule != "constant")


def make_training_arguments(
    method: OfflineMethod, spec: TrainerSpec, config: OfflineConfig, directory: Path, num_rows: int
) -> Any:
    """Return the training arguments of a trainer.

    The user's options under ``trainer:`` override the defaults. Options that are determined by
    other configuration keys override the defaults and the user's options.

    Args:
        method: Training method of the command.
        spec: The trainer.
        config: Configuration of the run.
        directory: The run directory.
        num_rows: Number of training examples.

    Raises:
        UserError: The batch size is not a multiple of the micro-batch size times the number of
            processes, or the value of an option is invalid.
    """
    world = launcher_number("WORLD_SIZE")
    check_batch_is_divisible(config, processes=world)
    steps = num_steps(config, num_rows)
    every = steps_between_evaluations(config, steps)
    defaults: dict[str, Any] = {
        "learning_rate": method.learning_rate,
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "logging_steps": default_logging_interval(steps),
        "logging_nan_inf_filter": False,  # the filter replaces nan losses by the mean of others
        "report_to": "none",
        "disable_tqdm": True,  # the run displays its own progress
        "lr_scheduler_type": "linear",
        "warmup_steps": default_warmup_steps(steps),
    }
    fixed: dict[str, Any] = {
        "output_dir": str(directory / "checkpoints"),
        "seed": config.seed,
        "use_cpu": default_device().type == "cpu",
        "bf16": False,  # the dtype of the weights determines the precision, not autocast
        "per_device_train_batch_size": config.micro_batch_size,
        "per_device_eval_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // (config.micro_batch_size * world),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
    }
    # The training arguments accept only transformers' optimizers, see `make_trainer`.
    handled = spec.handled_options | ({"optim"} if _plugin_optimizer(config) else set())
    requested = {key: value for key, value in config.trainer.items() if key not in handled}
    arguments = {**defaults, **spec.defaults, **requested, **fixed, **spec.fixed}
    with option_errors_as_user_errors():
        return spec.arguments_class(**arguments)


def _plugin_optimizer(config: OfflineConfig) -> str | None:
    """Return ``trainer.optim`` if it is the optimizer of a plug-in, else None."""
    name = config.trainer.get("optim")
    return name if isinstance(name, str) and name in OPTIMIZERS.sources else None


def check_batch_is_divisible(config: OfflineConfig, *, processes: int) -> None:
    """Raise UserError if the processes cannot share the micro-batches of a step equally."""
    if config.batch_size % (config.micro_batch_size * processes):
        raise UserError(
            f"batch_size must be a multiple of micro_batch_size x processes, got "
            f"{config.batch_size}, {config.micro_batch_size} and {processes}"
        )


def make_trainer(
    setup: TrainingSetup, config: OfflineConfig, options: Any, train_set: Any, eval_set: Any
) -> Any:
    """Return the trainer, with early stopping if ``patience`` is set.

    If a trained weight is not float32, the optimizer has float32 master weights.

    Args:
        setup: Setup of the run.
        config: Configuration of the run.
        options: Training arguments, from `make_training_arguments`.
        train_set: Training examples.
        eval_set: Held-out examples.

    Raises:
        UserError: The value of an option is invalid.
    """
    spec = setup.trainer
    assert spec is not None
    extra: dict[str, Any] = {"processing_class": setup.tokenizer, **spec.constructor_arguments}
    if config.patience is not None:
        extra["callbacks"] = [transformers.EarlyStoppingCallback(config.patience)]
    trained = [p for p in setup.model.parameters() if p.requires_grad]
    name = _plugin_optimizer(config)
    if name or any(p.dtype != torch.float32 for p in trained):
        name = name or toolkit_optimizer_name(getattr(options.optim, "value", options.optim))
        optimizer = make_optimizer(name, trained, optimizer_settings(options))
        extra["optimizers"] = (optimizer, None)
    with option_errors_as_user_errors():
        return spec.trainer(
            model=setup.model,
            args=options,
            train_dataset=spec.make_dataset(train_set),
            eval_dataset=spec.make_dataset(eval_set),
            **extra,
        )


@contextlib.contextmanager
def option_errors_as_user_errors() -> Iterator[None]:
    """Return a context manager that converts a trainer's error about an option to a UserError.

    Trainers validate some options only at their first use. An error in code of the user is not
    converted.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError) or user_code_location(error) is not None:
            raise
        raise UserError(f"trainer: {first_line(error)}") from error
