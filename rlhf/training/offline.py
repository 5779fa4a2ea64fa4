"""SFT, reward models, DPO and KTO: the table of methods, and a run from its data to its model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf.config.data import DataSpec
from rlhf.config.offline import LEARNING_RATES, OWNED, OfflineConfig
from rlhf.config.optimization import native_options
from rlhf.data.load import load
from rlhf.data.splits import split_by_prompt
from rlhf.errors import UserError
from rlhf.models.adapters import share_base
from rlhf.models.architecture import text_config, unwrap_peft, whole_context
from rlhf.models.loading import load_model
from rlhf.models.saving import save_model
from rlhf.models.trainable import warn_of_dropout
from rlhf.rollout.chat_format import generation_stop_ids
from rlhf.runs.directory import Run, seed_everything
from rlhf.training.dpo import DPOTrainer
from rlhf.training.examples import Encoder
from rlhf.training.loop import fit
from rlhf.training.reward_models import setup as reward
from rlhf.training.reward_models.trainer import RewardTrainer
from rlhf.training.stages import Row, Stage, Work, engine_of
from rlhf.training.supervised import SupervisedTrainer

log = logging.getLogger(__name__)


def causal(verb: str) -> Callable[[OfflineConfig, list[Row], str], Work]:
    """Return the setup function of a method that trains a language model."""

    def prepare(config: OfflineConfig, rows: list[Row], engine: str) -> Work:
        model, tokenizer = load_model(config.model, seed=config.seed, texts=texts_of(rows))
        stop_ids = generation_stop_ids(model)
        max_length = within_context(config.max_length, model)
        encoder = Encoder(tokenizer, max_length=max_length, stop_ids=stop_ids)
        log.info(encoder.chat_format.describe())
        trainer = None
        if engine == "trl":
            from rlhf.training.trl.trainer import causal_trainer

            trainer = causal_trainer(verb, config, model, tokenizer, max_length=max_length)
        if verb != "sft":
            warn_of_dropout(verb, config.model)

        def save(trained: Any, final: Path) -> None:
            save_model(trained, tokenizer, final)

        return Work(
            model=model,
            tokenizer=tokenizer,
            encode=lambda rows, training: encoder(rows, pairs=verb == "dpo"),
            summary=encoder.summary,
            save=save,
            trainer=trainer,
            dropout=verb == "sft",
        )

    return prepare


def within_context(max_length: int, model: Any) -> int:
    """The length to which examples are cut: no longer than the model has positions for."""
    positions = whole_context(text_config(unwrap_peft(model)))
    if max_length > positions:
        log.info(
            "max_length %d: the model has %d positions, so examples are cut there; how many are is "
            "counted below",
            max_length,
            positions,
        )
    return min(max_length, positions)


STAGES = {
    "sft": Stage("sft", LEARNING_RATES["sft"], causal("sft")),
    "dpo": Stage("preference", LEARNING_RATES["dpo"], causal("dpo")),
    "kto": Stage("label", LEARNING_RATES["kto"], causal("kto"), native=False),
}


TRAINERS = {"sft": SupervisedTrainer, "dpo": DPOTrainer, "reward": RewardTrainer}
"""Command -> trainer of the native engine."""


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
    engine = engine_of(config, native=stage.native)
    seed_everything(config.seed)
    train_rows, eval_rows = load_rows(config, stage)
    work = stage.prepare(config, train_rows, engine)
    train_set, eval_set = work.encode(train_rows, True), work.encode(eval_rows, False)
    if work.summary():
        log.info("examples: %s", work.summary())
    log.info("engine: %s", "trl" if work.trainer else "native")
    if work.trainer:
        from rlhf.training.trl.trainer import train_with_trainer

        sets = (train_set, eval_set)
        trained = train_with_trainer(config, run, stage=stage, work=work, sets=sets)
        share_base(run.directory / "checkpoints", run.final)
        work.save(trained, run.final)
    else:
        options = native_options(verb, config.trainer, learning_rate=stage.learning_rate)
        fit(TRAINERS[verb](config, options, work, train_set, eval_set), run)
    if work.judge:
        work.judge(run)
    return run.final


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
    if work.trainer:
        from rlhf.training.trl.trainer import make_options

        make_options(stage, work.trainer, config, Path(config.output_dir), num_rows)
    else:
        native_options(verb, config.trainer, learning_rate=stage.learning_rate)


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
