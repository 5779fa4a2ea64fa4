"""What an offline stage is: a row of a table, and what it brings to its trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from rlhf.config.offline import OfflineConfig
from rlhf.runs.directory import Run

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A stage made ready: the model, how rows become examples, and what is left behind."""

    model: Any
    """To be trained, adapters and all."""
    tokenizer: Any
    encode: Callable[[Sequence[Row], bool], Dataset]
    """(rows, whether they are for training) -> examples; UserError if none is left."""
    summary: Callable[[], str]
    """What happened to rows on the way, for the log; empty when nothing did."""
    save: Callable[[Any, Path], None]
    """Write the trained model into a folder."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the trainer, beside those that every stage has."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of the trainer's options; the user's own come after them."""
    owned: Mapping[str, Any] = field(default_factory=dict)
    """Of the trainer's options; the user cannot change them."""
    handled: frozenset[str] = frozenset()
    """Options under `trainer` that the stage sees to itself, because its trainer has none such."""
    judge: Callable[[Run], None] | None = None
    """Report on the saved model."""
    dropout: bool = False
    """Whether dropout is active in updates; in TRL's trainers it is where its rate is not 0."""


@dataclass(frozen=True)
class Stage:
    """A row of the table: the trainer's classes, the rows it takes, and how to make it ready."""

    trainer: type
    options: type
    data: str
    """Kind of the rows, see `rlhf.config.data.Kind`."""
    learning_rate: float
    prepare: Callable[[Any, list[Row]], Work]
    """(configuration, training rows) -> what the stage brings."""
    keep: tuple[str, ...] = ()
    """Further columns of the rows."""


def num_steps(config: OfflineConfig, num_rows: int) -> int:
    """Optimizer steps of the whole run."""
    if (limit := config.trainer.get("max_steps", -1)) > 0:
        return limit
    epochs = config.trainer.get("num_train_epochs", 1)
    return max(1, math.ceil(math.ceil(num_rows / config.batch_size) * epochs))


def evaluation_steps(config: OfflineConfig, steps: int) -> int:
    """Steps from one evaluation to the next."""
    return max(1, steps // config.evaluations)


def logging_steps(steps: int) -> int:
    """Steps from one line of metrics to the next, where the options name none."""
    return max(1, min(10, steps // 20))


def warmup_steps(steps: int) -> int:
    """Steps of warm-up, where the options name none."""
    return min(10, steps // 10)
