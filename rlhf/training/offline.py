"""Run the offline methods (SFT, reward models, DPO, KTO), from the data to the trained model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.common.files import add_path_to_write_errors
from rlhf.common.launcher import launcher_number
from rlhf.common.worker_pool import available_cpus
from rlhf.config.data import DataSpec
from rlhf.config.offline import LEARNING_RATES, RESERVED_OPTIONS, OfflineConfig
from rlhf.config.optimization import native_options
from rlhf.data.cache import cache_folder
from rlhf.data.load import load_and_log
from rlhf.data.row_store import Unstorable
from rlhf.data.splits import split_by_prompt
from rlhf.data.stored_rows import (
    DataPreparationSettings,
    StoredRows,
    are_large,
    count_shared_prompts,
    load_stored,
    split_stored_by_prompt,
)
from rlhf.errors import UserError
from rlhf.models.adapters import copy_base_to_final
from rlhf.models.architecture import configured_context_length, text_config, unwrap_peft
from rlhf.models.loading import load_model
from rlhf.models.saving import save_model
from rlhf.models.sharding.loading import load_model_to_shard
from rlhf.models.trainable import warn_of_ignored_dropout
from rlhf.rollout.chat_format import generation_stop_ids
from rlhf.runs.callbacks import Callbacks
from rlhf.runs.checksums import list_files_without_checksum, write_checksums
from rlhf.runs.directory import Run, seed_everything
from rlhf.training.distributed import (
    init_distributed,
    lost_process_as_user_error,
    prepare_for_sharding,
)
from rlhf.training.dpo import DPOTrainer
from rlhf.training.examples import Example, ExampleEncoder
from rlhf.training.loop import fit
from rlhf.training.methods import OfflineMethod, Row, TrainingSetup, engine_of, num_steps
from rlhf.training.reply_samples import prompts_to_sample, write_reply_samples
from rlhf.training.reward_models import setup as reward
from rlhf.training.reward_models.trainer import RewardTrainer
from rlhf.training.stored_examples import CachingEncoder
from rlhf.training.streamed_examples import ExampleStream, StreamedSource
from rlhf.training.supervised import SupervisedTrainer

log = logging.getLogger(__name__)

SetupFunction = Callable[[OfflineConfig, Sequence[Row] | StreamedSource, str], TrainingSetup]


def make_causal_setup_function(command: str) -> SetupFunction:
    """Return the function that sets up a run of "sft", "dpo" or "kto".

    The function takes the configuration, the training rows and the engine, and loads the model.
    """

    def setup(
        config: OfflineConfig, rows: Sequence[Row] | StreamedSource, engine: str
    ) -> TrainingSetup:
        load = load_model_to_shard if prepare_for_sharding(config) else load_model
        model, tokenizer = load(config.model, seed=config.seed, tokenizer_texts=message_texts(rows))
        stop_ids = generation_stop_ids(model)
        max_length = max_length_within_context(config.max_length, model)
        encoder = ExampleEncoder(tokenizer, max_length=max_length, stop_ids=stop_ids)
        encode_rows = CachingEncoder(encoder, pairs=command == "dpo")

        def encode(
            rows: Sequence[Row] | StreamedSource, training: bool
        ) -> Sequence[Example] | ExampleStream:
            del training
            if isinstance(rows, StreamedSource):
                return ExampleStream(rows, encoder)
            return encode_rows(rows)

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
            encode=encode,
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
    "sft": OfflineMethod("sft", LEARNING_RATES["sft"], make_causal_setup_function("sft")),
    "dpo": OfflineMethod("preference", LEARNING_RATES["dpo"], make_causal_setup_function("dpo")),
    "kto": OfflineMethod(
        "label", LEARNING_RATES["kto"], make_causal_setup_function("kto"), native=False
    ),
}


NATIVE_TRAINERS = {"sft": SupervisedTrainer, "dpo": DPOTrainer, "reward": RewardTrainer}
"""Command -> trainer of the native engine."""


def method_of(command: str, config: Any) -> OfflineMethod:
    """Return the training method of a command. For "reward", it depends on ``config.kind``."""
    return reward.method_of(config) if command == "reward" else METHODS[command]


def checked_method_and_engine(command: str, config: Any) -> tuple[OfflineMethod, str]:
    """Return the training method of a command and the engine of the run.

    Raises:
        UserError: An option is reserved, or the engine or a stream of rows is not possible.
    """
    method = method_of(command, config)
    _check_no_reserved_options(config.trainer)
    engine = engine_of(config, native_supported=method.native)
    _check_streaming(command, config, engine)
    return method, engine


@lost_process_as_user_error()
def train_offline(command: str, config: OfflineConfig, run: Run) -> Path:
    """Train on a dataset, from the start or from the last checkpoint.

    Args:
        command: "sft", "reward", "dpo" or "kto".
        config: Configuration of the command.
        run: The run directory.

    Returns:
        The folder of the model with the lowest held-out loss, or of the last model if no held-out
        loss was finite.

    Raises:
        UserError: An option or the data are invalid, or training diverged.
        Interrupted: The user stopped the run.
    """
    method, engine = checked_method_and_engine(command, config)
    seed_everything(config.seed)
    train_rows, eval_rows = _load_and_count_rows(config, method, run)
    setup = method.setup(config, train_rows, engine)
    if command != "reward":
        setup = replace(setup, prompts=prompts_to_sample(eval_rows))
    train_set, eval_set = setup.encode(train_rows, True), setup.encode(eval_rows, False)
    if setup.summary():  # a warning, so that Python programs show it too
        log.warning("examples: %s", setup.summary())
    log.info("engine: %s", "trl" if setup.trainer else "native")
    if setup.trainer:
        _train_and_save_with_trl(config, run, method, setup, (train_set, eval_set))
    else:
        options = native_options(
            command, config.trainer, default_learning_rate=method.learning_rate
        )
        trainer = NATIVE_TRAINERS[command](config, options, setup, train_set, eval_set)
        try:
            fit(trainer, run)
        finally:
            trainer.close()
    if setup.write_report and run.writes:
        setup.write_report(run)
    init_distributed().barrier()
    return run.final


def _train_and_save_with_trl(
    config: OfflineConfig,
    run: Run,
    method: OfflineMethod,
    setup: TrainingSetup,
    train_and_eval_sets: Any,
) -> None:
    """Train with ``setup.trainer`` on the training and the held-out examples; save the model.

    The process that writes the run directory also records replies and calls ``on_end`` of the
    callbacks.
    """
    from rlhf.training.trl.trainer import train_with_trainer

    callbacks = Callbacks(config.callbacks)
    trained, steps = train_with_trainer(
        config,
        run,
        method=method,
        setup=setup,
        train_and_eval_sets=train_and_eval_sets,
        callbacks=callbacks,
    )
    if not run.writes:
        return
    foreign = list_files_without_checksum(run.final)
    copy_base_to_final(run.directory / "checkpoints", run.final)
    with add_path_to_write_errors(run.final):
        setup.save(trained, run.final)
        write_checksums(run.final, exclude=foreign)
    write_reply_samples(
        run, trained, setup.tokenizer, setup.prompts, step=steps, before_or_after="after"
    )
    callbacks.notify(
        "on_end",
        run,
        step=steps,
        num_steps=num_steps(config, len(train_and_eval_sets[0])),
        model=trained,
        tokenizer=setup.tokenizer,
        folder=run.final,
    )


def _load_and_count_rows(
    config: OfflineConfig, method: OfflineMethod, run: Run
) -> tuple[Sequence[Row] | StreamedSource, Sequence[Row]]:
    """Return the training rows and the held-out rows, and record their numbers in the run."""
    counts: dict[str, Any] = {}
    train_rows, eval_rows = load_train_and_eval_rows(config, method, counts=counts)
    num_train = None if isinstance(train_rows, StreamedSource) else len(train_rows)
    run.write_data_counts(counts | {"training_rows": num_train, "held_out_rows": len(eval_rows)})
    return train_rows, eval_rows


def _check_no_reserved_options(options: Mapping[str, Any]) -> None:
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
        native_options(command, config.trainer, default_learning_rate=method.learning_rate)


def _check_streaming(command: str, config: OfflineConfig, engine: str) -> None:
    """Check that a run with streamed training data is possible.

    Raises:
        UserError: A condition is not met; the message states it.
    """
    if not any(spec.streaming for spec in config.data):
        return
    (spec, *others), wrong = config.data, None
    if command != "sft" or engine != "native":
        wrong = "only rlhf sft with the native engine can stream rows"
    elif others:
        wrong = "a stream cannot be mixed with other sources; give one source"
    elif spec.limit is not None or spec.weight is not None:
        wrong = "limit and weight need all rows; remove them"
    elif config.model.scratch:
        wrong = "the tokenizer of a model from scratch needs all rows; set model.path"
    elif config.trainer.get("max_steps", -1) <= 0:
        wrong = "the number of rows is unknown; set trainer.max_steps"
    elif not config.eval_data:
        wrong = "rows of a stream cannot be held out; give eval_data"
    if wrong:
        raise UserError(f"data.streaming: {wrong}")


def load_train_and_eval_rows(
    config: OfflineConfig, method: OfflineMethod, *, counts: dict[str, Any] | None = None
) -> tuple[Sequence[Row] | StreamedSource, Sequence[Row]]:
    """Return the training rows and the held-out rows.

    Rows that are split from the training data have no prompt in common with the training rows. Rows
    of ``eval_data`` are not removed, but a warning gives the number of those whose prompt (or text)
    is also in the training data. Streamed training data are not compared.

    If ``counts`` is given, the numbers of rows of each source are added to it.
    """
    if config.data[0].streaming:
        # Every process of torchrun reads the stream.
        readers = launcher_number("LOCAL_WORLD_SIZE")
        processes = config.data_processes or max(1, available_cpus() // readers)
        streamed = StreamedSource(config.data[0], config.seed, processes)
        return streamed, _load_rows(
            config, method, config.eval_data, what="eval_data", counts=counts
        )
    rows = _load_rows(config, method, config.data, what="data", counts=counts)
    if config.eval_data:
        eval_rows = _load_rows(config, method, config.eval_data, what="eval_data", counts=counts)
        if shared := count_shared_prompts(eval_rows, rows):
            log.warning(
                "%d of the %d rows of eval_data have a prompt that is also in data: the held-out "
                "results include prompts of the training data",
                shared,
                len(eval_rows),
            )
        return rows, eval_rows
    if isinstance(rows, StoredRows):
        return split_stored_by_prompt(rows, fraction=config.eval_fraction, seed=config.seed)
    return split_by_prompt(rows, fraction=config.eval_fraction, seed=config.seed)


def _load_rows(
    config: OfflineConfig,
    method: OfflineMethod,
    specs: Sequence[DataSpec],
    *,
    what: str,
    counts: dict[str, Any] | None,
) -> Sequence[Row]:
    """Load datasets and log a summary.

    The rows of large datasets stay on the disk, unless JSON cannot represent a value.
    """
    if are_large(specs):
        processes = config.data_processes or available_cpus()
        preparation = DataPreparationSettings(cache_folder(config.data_cache), processes)
        try:
            loaded = load_stored(
                specs,
                method.data_kind,
                seed=config.seed,
                preparation=preparation,
                keep=method.additional_columns,
            )
        except Unstorable:
            log.info("%s: read into memory, because some values have no form in JSON", what)
        else:
            loaded.log_summary(what)
            if counts is not None:
                counts[what] = loaded.counts()
            return loaded.rows
    return load_and_log(
        specs,
        method.data_kind,
        data_name=what,
        seed=config.seed,
        keep=method.additional_columns,
        counts=counts,
    )


def message_texts(rows: Sequence[Row] | StreamedSource) -> Iterator[str]:
    """Yield the texts of all messages. The tokenizer of a new model is trained on these texts."""
    if isinstance(rows, StreamedSource):  # `_check_streaming` permits no new model
        return
    fields = ("prompt", "completion", "chosen", "rejected")
    yield from (row["text"] for row in rows if "text" in row)
    yield from (m["content"] for row in rows for field in fields for m in row.get(field, ()))
