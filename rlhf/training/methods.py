"""Define offline training methods, the setup of a run, and its number of steps."""

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
    """A trainer of TRL or transformers for one run, with its data columns and arguments."""

    trainer: type
    options: type
    """Class of its training arguments."""
    columns: Callable[[Sequence[Any]], Any]
    """Converts examples to the data set that the trainer reads."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the trainer."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Training arguments that `trainer:` in the configuration may override."""
    owned: Mapping[str, Any] = field(default_factory=dict)
    """Training arguments that the user cannot change."""
    handled: frozenset[str] = frozenset()
    """Keys under `trainer:` that this package implements because the trainer does not."""


@dataclass(frozen=True)
class TrainingSetup:
    """The setup of one run: the model, the encoder of its rows, and how the result is saved."""

    model: Any
    """The model to train, with its adapters."""
    tokenizer: Any
    encode: Callable[[Sequence[Row], bool], Sequence[Any]]
    """Function (rows, whether they are for training) -> examples; UserError if none is left."""
    summary: Callable[[], str]
    """Returns the counts of truncated and dropped rows for the log; empty if there are none."""
    save: Callable[[Any, Path], None]
    """Writes the trained model to a folder."""
    trainer: TrainerSpec | None = None
    """The trainer of TRL or transformers; None if the native engine trains."""
    report: Callable[[Run], None] | None = None
    """Writes a report on the saved model; None if the method has no report."""
    dropout: bool = False
    """Whether dropout is active in updates of the native engine."""


@dataclass(frozen=True)
class OfflineMethod:
    """An offline training method."""

    data: Kind
    """Kind of the training data."""
    learning_rate: float
    setup: Callable[[Any, list[Row], str], TrainingSetup]
    """Function (configuration, training rows, engine) -> setup of the run."""
    native: bool = True
    """Whether the native engine implements the method."""
    keep: tuple[str, ...] = ()
    """Additional columns that are kept in the training data."""


def engine_of(config: OfflineConfig, *, native: bool) -> str:
    """Return the engine that trains: "native" or "trl".

    Args:
        native: Whether the native engine implements the method of the run.

    Raises:
        UserError: `engine` is "native" but the native engine does not implement the method, or
            `profile` is set but TRL trains.
    """
    if config.engine == "native" and not native:
        raise UserError(
            "engine: native trains sft, dpo, and reward models of kind preference with one head on "
            "a decoder; omit engine for this run"
        )
    engine = ("native" if native else "trl") if config.engine == "auto" else config.engine
    if config.profile and engine == "trl":
        raise UserError("profile has no effect on this run: only the native engine is profiled")
    return engine


def num_steps(config: OfflineConfig, num_rows: int) -> int:
    """Return the number of optimizer steps of the whole run."""
    if (limit := config.trainer.get("max_steps", -1)) > 0:
        return limit
    epochs = config.trainer.get("num_train_epochs", 1)
    return max(1, math.ceil(math.ceil(num_rows / config.batch_size) * epochs))


def evaluation_steps(config: OfflineConfig, steps: int) -> int:
    """Return the number of steps between evaluations."""
    return max(1, steps // config.evaluations)


def logging_steps(steps: int) -> int:
    """Return the default number of steps between logged metrics."""
    return max(1, min(10, steps // 20))


def warmup_steps(steps: int) -> int:
    """Return the default number of warm-up steps."""
    return min(10, steps // 10)
