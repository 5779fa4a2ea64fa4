"""Everything a native run holds: model, optimizer, examples, and how far it is."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.algorithms.batch import TrainingBatch
from rlhf.config.offline import OfflineConfig
from rlhf.config.optimization import NativeOptions
from rlhf.models.precision import MasterOptimizer
from rlhf.models.trainable import Movement, set_dropout
from rlhf.runs.directory import Run
from rlhf.training.batching import micro_batches
from rlhf.training.distributed import World, join
from rlhf.training.examples import Example
from rlhf.training.native_tasks import Task, collate
from rlhf.training.optimizers import (
    make_optimizer,
    make_scheduler,
    optimizer_name,
    optimizer_settings,
)
from rlhf.training.stages import Work, num_steps, warmup_steps
from rlhf.training.throughput import Throughput

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is, and its best evaluation so far."""

    step: int = 0
    best: float = math.inf
    since: int = 0
    """Evaluations since the best one."""

    def state_dict(self) -> dict[str, float]:
        """As plain numbers."""
        return {"step": self.step, "best": self.best, "since": self.since}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what ``state_dict`` gave."""
        self.step, self.best = int(state["step"]), float(state["best"])
        self.since = int(state["since"])


@dataclass(frozen=True)
class Schedule:
    """Which examples each step sees: a fresh permutation every epoch."""

    num_rows: int
    batch_size: int
    num_steps: int
    seed: int

    def rows(self, step: int) -> list[int]:
        """Examples of a step, counted from 0."""
        per_epoch = math.ceil(self.num_rows / self.batch_size)
        epoch, place = divmod(step, per_epoch)
        order = _order(self.num_rows, self.seed, epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size].tolist()


@functools.lru_cache(maxsize=1)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Of the examples in an epoch; every step of it asks."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


@dataclass
class Lesson:
    """Everything a native run holds."""

    task: Task
    learner: Any
    movement: Movement
    """Of the model since the start of the run."""
    options: NativeOptions
    config: OfflineConfig
    world: World
    optimizer: MasterOptimizer
    scheduler: Any
    schedule: Schedule
    sets: dict[str, Sequence[Example]]
    """Examples to train on ("train") and held-out ones ("eval")."""
    references: dict[str, list[Tensor]] = field(default_factory=dict)
    """Of each set, where the task has a reference."""
    progress: Progress = field(default_factory=Progress)
    meter: Throughput | None = None
    """Counts what steps cost, for a profile."""
    dropout: bool = False
    """Whether dropout is active in updates."""


def open_lesson(
    task: Task, config: OfflineConfig, options: NativeOptions, *, work: Work, sets: tuple[Any, Any]
) -> Lesson:
    """The model with its optimizer and schedule, and the examples as the task takes them."""
    train_set, eval_set = sets
    examples: dict[str, Sequence[Example]] = {"train": train_set, "eval": eval_set}
    steps = num_steps(config, len(train_set))
    learner = task.learner(work.model, work.tokenizer)
    optimizer = make_optimizer(
        optimizer_name(options.optim), learner.parameters(), optimizer_settings(options)
    )
    warmup = warmup_steps(steps) if options.warmup_steps is None else options.warmup_steps
    scheduler = make_scheduler(
        options.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
    schedule = Schedule(len(train_set), config.batch_size, steps, config.seed)
    lesson = Lesson(
        task,
        learner,
        Movement(learner.model),
        options,
        config,
        join(),
        optimizer,
        scheduler,
        schedule,
        examples,
    )
    lesson.dropout = work.dropout
    if config.profile:
        lesson.meter = Throughput(learner)
    return lesson


def batch_of(lesson: Lesson, name: str, rows: Sequence[int]) -> TrainingBatch:
    """Some examples of a set as tensors, with the reference's log-probabilities if it has them."""
    learner, references = lesson.learner, lesson.references.get(name)
    return collate(
        [lesson.sets[name][row] for row in rows],
        pad_id=learner.tokenizer.pad_token_id,
        device=learner.device,
        references=references and [references[row] for row in rows],
    )


def _places(lesson: Lesson, batch: TrainingBatch) -> list[Tensor]:
    """Rows of this process's portions of a batch."""
    parts = micro_batches(
        batch.tokens,
        batch.attention_mask,
        batch.require("pair_ids").tolist(),
        max_tokens=lesson.config.micro_batch_size * lesson.config.max_length,
        packed=lesson.learner.packs_rows(batch.attention_mask),
    )
    device = lesson.learner.device
    return [torch.tensor(rows, device=device) for rows in lesson.world.mine(parts)]


def portions(lesson: Lesson, batch: TrainingBatch) -> Iterable[TrainingBatch]:
    """What this process computes of a batch, so much at a time as fits."""
    return (batch.select(places) for places in _places(lesson, batch))


def chunks(rows: range, size: int) -> Iterable[list[int]]:
    """Rows in order, ``size`` at a time."""
    return (list(rows[start : start + size]) for start in range(0, len(rows), size))


@torch.no_grad()
def references_of(lesson: Lesson, run: Run, path: Path) -> dict[str, list[Tensor]]:
    """[rows, length] log-probabilities of every example that is used, before any step.

    The portions are those of the first epoch, so that the first loss is ln 2 to the bit; they are
    kept in a file, so that a resumed run has the same.
    """
    if path.exists() and lesson.config.resume:
        return torch.load(path, weights_only=True)
    log.info("log-probabilities of the reference, once for all epochs")
    set_dropout(lesson.learner.model, active=False)
    schedule = lesson.schedule
    per_epoch = math.ceil(schedule.num_rows / schedule.batch_size)
    steps = range(min(schedule.num_steps, per_epoch))
    batches = {
        "train": [schedule.rows(step) for step in steps],
        "eval": list(chunks(range(len(lesson.sets["eval"])), lesson.config.batch_size)),
    }
    found: dict[str, list[Tensor]] = {}
    for name, parts in batches.items():
        table = [torch.zeros(0)] * len(lesson.sets[name])
        for rows in parts:
            batch = batch_of(lesson, name, rows)
            scored = torch.zeros(batch.tokens.shape, dtype=lesson.learner.logprob_dtype)
            for places in _places(lesson, batch):
                part = batch.select(places)
                width = part.tokens.shape[1]
                scored[places, :width] = lesson.learner.score(
                    part.tokens, part.attention_mask, part.action_mask, with_entropy=False
                ).logprobs.cpu()
            lesson.world.add([scored])
            for place, row in enumerate(rows):
                mine = (batch.require("pair_ids") == place).cpu()
                width = int(batch.attention_mask[mine].sum(1).max())
                table[row] = scored[mine, :width].clone()
        found[name] = table
    if run.writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path)
    return found
