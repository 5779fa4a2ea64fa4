"""SFT, reward models, DPO and KTO: one table, one adapter to their trainers, known traps closed.

Never a subclass, never a private name: the trainers are steered by their arguments alone.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from rlhf.config.data import DataSpec
from rlhf.config.offline import LEARNING_RATES, OWNED, OfflineConfig
from rlhf.config.optimization import native_options
from rlhf.data.load import load
from rlhf.data.splits import split_by_prompt
from rlhf.errors import UserError
from rlhf.models.adapters import name_base_of_checkpoints, share_base
from rlhf.models.architecture import text_config, whole_context
from rlhf.models.loading import load_model
from rlhf.models.logprobs import bare
from rlhf.models.precision import MasterAdamW, default_device
from rlhf.models.saving import save_model
from rlhf.models.trainable import Movement, make_frozen, warn_of_dropout
from rlhf.rollout.chat_format import generation_stop_ids
from rlhf.runs.directory import Run, seed_everything
from rlhf.runs.interrupt import StopRequest
from rlhf.training.native import train_native
from rlhf.training.native_tasks import TASKS
from rlhf.training.reward_models import stage as reward
from rlhf.training.stages import (
    Row,
    Stage,
    Work,
    evaluation_steps,
    logging_steps,
    num_steps,
    warmup_steps,
)
from rlhf.training.trl.callback import Recorder
from rlhf.training.trl.columns import LabelCollator, PairCollator
from rlhf.training.trl.examples import Encoder

log = logging.getLogger(__name__)


def causal(verb: str) -> Callable[[OfflineConfig, list[Row]], Work]:
    """How a stage on a language model is made ready."""

    def prepare(config: OfflineConfig, rows: list[Row]) -> Work:
        model, tokenizer = load_model(config.model, seed=config.seed, texts=texts_of(rows))
        native = engine_of(verb, config) == "native"
        stop_ids = generation_stop_ids(model)
        max_length = within_context(config.max_length, model)
        encoder = Encoder(tokenizer, max_length=max_length, stop_ids=stop_ids)
        log.info(encoder.chat_format.describe())
        form = "pair" if native and verb == "dpo" else verb
        arguments: dict[str, Any] = {}
        owned: dict[str, Any] = {"max_length": max_length}
        if verb in ("dpo", "kto") and not native:
            arguments["data_collator"] = collator_of(verb, config, tokenizer.pad_token_id)
            owned["remove_unused_columns"] = False  # the collator reads our own
        if verb in ("dpo", "kto") and not native and bare(model) is model:
            # Without one TRL reads the reference from disk by name, whatever the weights are now.
            arguments["ref_model"] = make_frozen(copy.deepcopy(model))
        if verb != "sft":
            warn_of_dropout(verb, config.model)

        def save(trained: Any, final: Path) -> None:
            save_model(trained, tokenizer, final)

        return Work(
            model=model,
            tokenizer=tokenizer,
            encode=lambda rows, training: encoder(form, rows),
            summary=encoder.summary,
            save=save,
            arguments=arguments,
            owned=owned,
            dropout=verb == "sft",
        )

    return prepare


def within_context(max_length: int, model: Any) -> int:
    """The length to which examples are cut: no longer than the model has positions for."""
    positions = whole_context(text_config(bare(model)))
    if max_length > positions:
        log.info(
            "max_length %d: the model has %d positions, so examples are cut there; how many are is "
            "counted below",
            max_length,
            positions,
        )
    return min(max_length, positions)


def collator_of(verb: str, config: OfflineConfig, pad_id: Any) -> Any:
    """The collator that gives TRL's trainer our ids."""
    multiple = config.trainer.get("pad_to_multiple_of")
    if verb == "dpo":
        return PairCollator(pad_id, multiple)
    return LabelCollator(pad_id, config.max_length, multiple)


STAGES = {
    "sft": Stage(trl.SFTTrainer, trl.SFTConfig, "sft", LEARNING_RATES["sft"], causal("sft")),
    "dpo": Stage(trl.DPOTrainer, trl.DPOConfig, "preference", LEARNING_RATES["dpo"], causal("dpo")),
    "kto": Stage(trl.KTOTrainer, trl.KTOConfig, "label", LEARNING_RATES["kto"], causal("kto")),
}


def stage_of(verb: str, config: Any) -> Stage:
    """The table row of a verb; a reward model's kinds are a table of their own."""
    return reward.stage_of(config) if verb == "reward" else STAGES[verb]


def train_offline(verb: str, config: OfflineConfig, run: Run) -> Path:
    """Train a stage from start, or from its last checkpoint, to its end.

    Args:
        verb: "sft", "reward", "dpo" or "kto".
        config: of the run.
        run: its directory.

    Returns:
        The folder of the best model.

    Raises:
        UserError: bad options or data; Interrupted when the user stops it.
    """
    stage = stage_of(verb, config)
    check_options(config.trainer)
    engine_of(verb, config)
    seed_everything(config.seed)
    train_rows, eval_rows = load_rows(config, stage)
    work = stage.prepare(config, train_rows)
    train_set, eval_set = work.encode(train_rows, True), work.encode(eval_rows, False)
    if work.summary():
        log.info("examples: %s", work.summary())
    engine = engine_of(verb, config, work.model)
    log.info("engine: %s", engine)
    train = train_native if engine == "native" else train_with_trainer
    trained = train(verb, config, run, stage=stage, work=work, sets=(train_set, eval_set))
    share_base(run.directory / "checkpoints", run.final)
    work.save(trained, run.final)
    if work.judge:
        work.judge(run)
    return run.final


def engine_of(verb: str, config: Any, model: Any = None) -> str:
    """The engine that trains: the one asked for, or the native one where it has the stage.

    Args:
        verb: of the stage.
        config: of the run.
        model: the loaded one; a reward model on an encoder shows only then that it is none of ours.

    Raises:
        UserError: engine: native, where the stage is not its own.
    """
    ours = verb in TASKS
    if verb == "reward":
        ours = config.kind == "preference" and config.num_heads == 1
        ours = ours and (model is None or "score" in dict(bare(model).named_children()))
    if config.engine == "native" and not ours:
        raise UserError(
            "engine: native trains sft, dpo, and reward models of kind preference with one head on "
            "a decoder; for this run leave engine out"
        )
    engine = ("native" if ours else "trl") if config.engine == "auto" else config.engine
    if config.profile and engine == "trl":
        raise UserError("profile has no effect on this run: only the native engine is profiled")
    return engine


def train_with_trainer(
    verb: str, config: OfflineConfig, run: Run, *, stage: Stage, work: Work, sets: tuple[Any, Any]
) -> Any:
    """Train with TRL's trainer, or transformers' own; returns the best model."""
    options = make_options(stage, work, config, run.directory, len(sets[0]))
    if bare(work.model) is not work.model and run.writes:
        name_base_of_checkpoints(work.model, work.tokenizer, run.directory / "checkpoints")
    with StopRequest() as stop:
        trainer = make_trainer(stage, work, config, options, *sets)
        for chatty in (transformers.PrinterCallback, transformers.ProgressCallback):
            trainer.remove_callback(chatty)
        trainer.add_callback(Recorder(run, stop, Movement(work.model)))
        checkpoint = transformers.trainer_utils.get_last_checkpoint(options.output_dir)
        if config.resume and checkpoint:
            run.rewind(int(checkpoint.rsplit("-", 1)[1]))
        elif not config.resume or not checkpoint:
            checkpoint = None
            with refused_options():
                trainer.evaluate()  # step 0: what training starts from
        trainer.train(resume_from_checkpoint=checkpoint)
        stop.check(run.directory)
    return trainer.model


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that the run sets itself.

    Raises:
        UserError: names the key that decides instead.
    """
    for key in options:
        if key in OWNED:
            raise UserError(f"trainer.{key} is set by {OWNED[key]}: use that instead")


def check_trainer(
    verb: str, config: OfflineConfig, *, stage: Stage, work: Work, num_rows: int
) -> None:
    """Make the options of the engine that would train, and nothing else.

    Raises:
        UserError: the engine does not have the stage, or an option cannot be meant.
    """
    if engine_of(verb, config, work.model) == "native":
        native_options(verb, config.trainer, learning_rate=stage.learning_rate)
    else:
        make_options(stage, work, config, Path(config.output_dir), num_rows)


def load_rows(config: OfflineConfig, stage: Stage) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; held-out prompts never stand among the training ones."""
    rows = rows_of(config.data, stage, "data", seed=config.seed)
    if config.eval_data:
        return rows, rows_of(config.eval_data, stage, "eval_data", seed=config.seed)
    return split_by_prompt(rows, fraction=config.eval_fraction, seed=config.seed)


def rows_of(specs: list[DataSpec], stage: Stage, what: str, *, seed: int) -> list[Row]:
    """The rows of data sets, as a stage takes them."""
    loaded = load(specs, stage.data, seed=seed, keep=stage.keep)  # type: ignore[arg-type]
    log.info("%s: %s", what, loaded.summary())
    return loaded.rows


def texts_of(rows: list[Row]) -> list[str]:
    """Every message of every row, for the tokenizer of a model from scratch."""
    fields = ("prompt", "completion", "chosen", "rejected")
    plain = [row["text"] for row in rows if "text" in row]
    return plain + [m["content"] for row in rows for field in fields for m in row.get(field, ())]


def make_options(
    stage: Stage, work: Work, config: OfflineConfig, directory: Path, num_rows: int
) -> Any:
    """The trainer's options: its defaults, ours where those fail on a CPU, then the user's."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % (config.micro_batch_size * world):
        raise UserError(
            f"batch_size must be a multiple of micro_batch_size x processes, got "
            f"{config.batch_size}, {config.micro_batch_size} and {world}"
        )
    steps = num_steps(config, num_rows)
    every = evaluation_steps(config, steps)
    defaults: dict[str, Any] = {
        "learning_rate": stage.learning_rate,
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "logging_steps": logging_steps(steps),
        "report_to": "none",
        "disable_tqdm": True,  # the run has its own display
        "lr_scheduler_type": "linear",
        "warmup_steps": warmup_steps(steps),
    }
    owned: dict[str, Any] = {
        "output_dir": str(directory / "checkpoints"),
        "seed": config.seed,
        "use_cpu": default_device().type == "cpu",
        "bf16": False,  # the weights carry the precision, not autocast
        "per_device_train_batch_size": config.micro_batch_size,
        "per_device_eval_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // (config.micro_batch_size * world),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
    }
    asked = {key: value for key, value in config.trainer.items() if key not in work.handled}
    given = {**defaults, **work.defaults, **asked, **owned, **work.owned}
    with refused_options():
        return stage.options(**given)


def make_trainer(
    stage: Stage, work: Work, config: OfflineConfig, options: Any, train_set: Any, eval_set: Any
) -> Any:
    """The trainer with the float32-master optimizer and early stopping."""
    extra: dict[str, Any] = {"processing_class": work.tokenizer, **work.arguments}
    if config.patience is not None:
        extra["callbacks"] = [transformers.EarlyStoppingCallback(config.patience)]
    trained = [p for p in work.model.parameters() if p.requires_grad]
    if any(p.dtype != torch.float32 for p in trained):
        extra["optimizers"] = (master_optimizer(trained, options), None)
    with refused_options():
        return stage.trainer(
            model=work.model, args=options, train_dataset=train_set, eval_dataset=eval_set, **extra
        )


@contextlib.contextmanager
def refused_options() -> Iterator[None]:
    """TRL's complaints as ours; some options it checks only when it first uses them."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error


def master_optimizer(parameters: list[Any], options: Any) -> MasterAdamW:
    """The optimizer that TRL's options describe, with float32 masters behind bf16 weights."""
    return MasterAdamW(
        parameters,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
    )
