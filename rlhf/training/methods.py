"""Data classes of offline training methods and of their setup, and default numbers of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.data import Kind
from rlhf.config.offline import OfflineConfig
from rlhf.errors import UserError
from rlhf.runs.directory import Run

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainerSpec:
    """A trainer of TRL or transformers for one run, with its datasets and arguments."""

    trainer: type
    arguments_class: type
    """Class of the training arguments."""
    make_dataset: Callable[[Sequence[Any]], Any]
    """Function that converts examples to the dataset that the trainer reads."""
    constructor_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the trainer's constructor, besides model, arguments and datasets."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Training arguments that `trainer:` in the configuration may override."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Training arguments that the user cannot change."""
    handled_options: frozenset[str] = frozenset()
    """Options under `trainer:` that this package implements and does not pass to the trainer."""


@dataclass(frozen=True)
class TrainingSetup:
    """The setup of a run: the model, and the functions that encode rows and save the model."""

    model: Any
    """The model to train, with its adapters."""
    tokenizer: Any
    encode: Callable[[Any, bool], Any]
    """Function (rows, whether the rows are for training) -> examples. It raises UserError if no
    row can be encoded. Streamed rows give a stream of examples."""
    summary: Callable[[], str]
    """Function that returns the counts of truncated and dropped rows as text for the log, or ""."""
    save: Callable[[Any, Path], None]
    """Function (trained model, folder) that writes the model to the folder."""
    trainer: TrainerSpec | None = None
    """The trainer of TRL or transformers; None if the native engine trains."""
    write_report: Callable[[Run], None] | None = None
    """Function that writes a report on the saved model; None if the method has no report."""
    dropout: bool = False
    """Whether dropout is active in updates of the native engine."""
    prompts: Sequence[Any] = ()
    """Held-out prompts whose replies are recorded before and after training; empty for reward
    models."""


@dataclass(frozen=True)
class OfflineMethod:
    """An offline training method."""

    data_kind: Kind
    """Kind of the training data."""
    learning_rate: float
    setup: Callable[[Any, Any, str], TrainingSetup]
    """Function (configuration, training rows, engine) -> setup of the run."""
    native: bool = True
    """Whether the native engine implements the method."""
    additional_columns: tuple[str, ...] = ()
    """Additional columns of the dataset that are kept in the rows."""


def engine_of(config: OfflineConfig, *, native_supported: bool) -> str:
    """Return the engine of a run, "native" or "trl".

    Args:
        config: Configuration of the run.
        native_supported: Whether the native engine implements the method of the run.

    Raises:
        UserError: `engine` is "native", but the native engine does not implement the method.
            Or `profile`, `activation_checkpointing` or `sharding` is set, but TRL trains.
    """
    if config.engine == "native" and not native_supported:
        raise UserError(
            "engine: native supports only sft, dpo, and reward models of kind preference with one "
            "head on a decoder; remove engine, or set engine: trl"
        )
    engine = ("native" if native_supported else "trl") if config.engine == "auto" else config.engine
    if config.profile and engine == "trl":
        raise UserError("profile has no effect on this run: only the native engine is profiled")
    if config.activation_checkpointing and engine == "trl":
        raise UserError(
            "activation_checkpointing has no effect with TRL, which trains this run: set "
            "trainer.gradient_checkpointing: true instead"
        )
    if config.sharding != "none" and engine == "trl":
        raise UserError(
            f"sharding: {config.sharding} is only supported by the native engine, but TRL trains "
            "this run: remove sharding"
        )
    return engine


def num_steps(config: OfflineConfig, num_rows: int) -> int:
    """Return the number of optimizer steps of a run on ``num_rows`` training examples.

    The result is ``trainer.max_steps`` if this is positive, otherwise the number of steps of
    ``trainer.num_train_epochs`` epochs (by default one), rounded up.
    """
    if (limit := config.trainer.get("max_steps", -1)) > 0:
        return limit
    epochs = config.trainer.get("num_train_epochs", 1)
    return max(1, math.ceil(math.ceil(num_rows / config.batch_size) * epochs))


def steps_between_evaluations(config: OfflineConfig, steps: int) -> int:
    """Return the number of optimizer steps between evaluations, for a run of ``steps`` steps."""
    return max(1, steps // config.evaluations)


def default_logging_interval(steps: int) -> int:
    """Return the default number of steps between logged metrics, for a run of ``steps`` steps."""
    return max(1, min(10, steps // 20))


def default_warmup_steps(steps: int) -> int:
    """Return the default number of warm-up steps, for a run of ``steps`` steps."""
    return min(10, steps // 10)
