"""Run the offline methods (SFT, reward models, DPO, KTO), from the data to the trained model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.config.offline import LEARNING_RATES, RESERVED_OPTIONS, OfflineConfig
from rlhf.config.optimization import native_options
from rlhf.data.leakage import indices_of_shared_prompts
from rlhf.data.load import load_and_log
from rlhf.data.splits import split_by_prompt
from rlhf.errors import UserError
from rlhf.models.adapters import copy_base_to_final
from rlhf.models.architecture import configured_context_length, text_config, unwrap_peft
from rlhf.models.loading import load_model
from rlhf.models.saving import save_model
from rlhf.models.trainable import warn_of_ignored_dropout
from rlhf.rollout.chat_format import generation_stop_ids
from rlhf.runs.checksums import write_checksums
from rlhf.runs.directory import Run, seed_everything
from rlhf.training.distributed import init_distributed
from rlhf.training.dpo import DPOTrainer
from rlhf.training.examples import ExampleEncoder
from rlhf.training.loop import fit
from rlhf.training.methods import OfflineMethod, Row, TrainingSetup, engine_of
from rlhf.training.reward_models import setup as reward
from rlhf.training.reward_models.trainer import RewardTrainer
from rlhf.training.supervised import SupervisedTrainer

log = logging.getLogger(__name__)


def make_causal_setup(command: str) -> Callable[[OfflineConfig, list[Row], str], TrainingSetup]:
    """Return the function that sets up a run of "sft", "dpo" or "kto".

    The function takes the configuration, the training rows and the engine, and loads the model.
    """

    def setup(config: OfflineConfig, rows: list[Row], engine: str) -> TrainingSetup:
        model, tokenizer = load_model(
            config.model, seed=config.seed, tokenizer_texts=message_texts(rows)
        )
        stop_ids = generation_stop_ids(model)
        max_length = max_length_within_context(config.max_length, model)
        encoder = ExampleEncoder(tokenizer, max_length=max_length, stop_ids=stop_ids)
        log.info(encoder.chat_format.describe())
        trainer = None
        if engine == "trl":
            from rlhf.training.trl.trainer import causal_trainer_spec

            trainer = causal_trainer_spec(command, config, model, tokenizer, max_length=max_length)
        if command != "sft":
            warn_of_ignored_dropout(command, config.model)

        return TrainingSetup(
            model=model,
            tokenizer=tokenizer,
            encode=lambda rows, training: encoder(rows, pairs=command == "dpo"),
            summary=encoder.truncated_and_dropped_text,
            save=lambda trained, final: save_model(trained, tokenizer, final),
            trainer=trainer,
            dropout=command == "sft",
        )

    return setup


def max_length_within_context(max_length: int, model: Any) -> int:
    """Return ``max_length``, or the number of the model's positions if that is smaller."""
    positions = configured_context_length(text_config(unwrap_peft(model)))
    if max_length > positions:
        log.info(
            "max_length %d exceeds the %d positions of the model: examples are truncated to %d "
            "tokens, and the number of truncated examples is logged below",
            max_length,
            positions,
            positions,
        )
    return min(max_length, positions)


METHODS = {
    "sft": OfflineMethod("sft", LEARNING_RATES["sft"], make_causal_setup("sft")),
    "dpo": OfflineMethod("preference", LEARNING_RATES["dpo"], make_causal_setup("dpo")),
    "kto": OfflineMethod("label", LEARNING_RATES["kto"], make_causal_setup("kto"), native=False),
}


NATIVE_TRAINERS = {"sft": SupervisedTrainer, "dpo": DPOTrainer, "reward": RewardTrainer}
"""Command -> trainer of the native engine."""


def method_of(command: str, config: Any) -> OfflineMethod:
    """Return the training method of a command. For "reward", it depends on ``config.kind``."""
    return reward.method_of(config) if command == "reward" else METHODS[command]


def train_offline(command: str, config: OfflineConfig, run: Run) -> Path:
    """Train on a dataset, from the start or from the last checkpoint.

    Args:
        command: "sft", "reward", "dpo" or "kto".
        config: Configuration of the command.
        run: The run directory.

    Returns:
        The folder of the model with the lowest held-out loss.

    Raises:
        UserError: An option or the data are invalid, or training diverged.
        Interrupted: The user stopped the run.
    """
    method = method_of(command, config)
    check_reserved_options(config.trainer)
    engine = engine_of(config, native_supported=method.native)
    seed_everything(config.seed)
    train_rows, eval_rows = load_train_and_eval_rows(config, method)
    setup = method.setup(config, train_rows, engine)
    train_set, eval_set = setup.encode(train_rows, True), setup.encode(eval_rows, False)
    if setup.summary():
        log.info("examples: %s", setup.summary())
    log.info("engine: %s", "trl" if setup.trainer else "native")
    if setup.trainer:
        from rlhf.training.trl.trainer import train_with_trainer

        sets = (train_set, eval_set)
        trained = train_with_trainer(config, run, method=method, setup=setup, sets=sets)
        if run.writes:
            copy_base_to_final(run.directory / "checkpoints", run.final)
            setup.save(trained, run.final)
            write_checksums(run.final)
    else:
        options = native_options(command, config.trainer, learning_rate=method.learning_rate)
        fit(NATIVE_TRAINERS[command](config, options, setup, train_set, eval_set), run)
    if setup.report and run.writes:
        setup.report(run)
    init_distributed().barrier()
    return run.final


def check_reserved_options(options: Mapping[str, Any]) -> None:
    """Raise UserError if the user sets a reserved option under ``trainer:``."""
    for key in options:
        if key in RESERVED_OPTIONS:
            raise UserError(f"trainer.{key} cannot be set: {RESERVED_OPTIONS[key]}")


def check_trainer_options(
    command: str,
    config: OfflineConfig,
    *,
    method: OfflineMethod,
    setup: TrainingSetup,
    num_rows: int,
) -> None:
    """Check the options under ``trainer:`` that the engine of the run reads.

    Args:
        command: "sft", "reward", "dpo" or "kto".
        config: Configuration of the command.
        method: Training method of the command.
        setup: Setup of the run, which determines the engine.
        num_rows: Number of training examples.

    Raises:
        UserError: An option is unknown to the engine, or its value is invalid.
    """
    if setup.trainer:
        from rlhf.training.trl.trainer import make_training_arguments

        make_training_arguments(method, setup.trainer, config, Path(config.output_dir), num_rows)
    else:
        native_options(command, config.trainer, learning_rate=method.learning_rate)


def load_train_and_eval_rows(
    config: OfflineConfig, method: OfflineMethod
) -> tuple[list[Row], list[Row]]:
    """Return the training rows and the held-out rows.

    Rows that are split from the training data have no prompt in common with the training rows. Rows
    of ``eval_data`` are not removed, but a warning gives the number of those whose prompt (or text)
    is also in the training data.
    """
    read = partial(load_and_log, kind=method.data, seed=config.seed, keep=method.keep)
    rows = read(config.data, what="data")
    if config.eval_data:
        eval_rows = read(config.eval_data, what="eval_data")
        if shared := len(indices_of_shared_prompts(eval_rows, rows)):
            log.warning(
                "%d of the %d rows of eval_data have a prompt that is also in data: the held-out "
                "results include prompts of the training data",
                shared,
                len(eval_rows),
            )
        return rows, eval_rows
    return split_by_prompt(rows, fraction=config.eval_fraction, seed=config.seed)


def message_texts(rows: list[Row]) -> list[str]:
    """Return the texts of all messages. The tokenizer of a new model is trained on these texts."""
    fields = ("prompt", "completion", "chosen", "rejected")
    plain = [row["text"] for row in rows if "text" in row]
    return plain + [m["content"] for row in rows for field in fields for m in row.get(field, ())]
