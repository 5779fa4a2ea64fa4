"""SFT, DPO and reward models on the engine that online algorithms use.

The same packed forward pass, optimizer, processes and checkpoints as the online loop, with a fixed
data set in place of rollouts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from rlhf.algorithms.tally import Tally
from rlhf.errors import UserError
from rlhf.models.precision import MasterAdamW, clip_gradients
from rlhf.progress import Reporter
from rlhf.runs import Run
from rlhf.training.batching import micro_batches
from rlhf.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from rlhf.training.distributed import World, join
from rlhf.training.interrupt import StopRequest
from rlhf.training.native_config import NativeOptions, native_options
from rlhf.training.native_tasks import TASKS, Example, Examples, Task, collate
from rlhf.training.offline_config import OfflineConfig
from rlhf.training.stages import Stage, Work, num_steps

log = logging.getLogger(__name__)

SHOWN = ("train/loss", "eval/loss", "train/accuracy", "eval/accuracy")


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
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return order[place * self.batch_size : (place + 1) * self.batch_size].tolist()


@dataclass
class Lesson:
    """Everything a native run holds."""

    task: Task
    learner: Any
    options: NativeOptions
    config: OfflineConfig
    world: World
    optimizer: MasterAdamW
    scheduler: Any
    schedule: Schedule
    train_set: Sequence[Example]
    eval_set: Sequence[Example]
    references: dict[str, list[Tensor]] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)


def train_native(
    verb: str, config: OfflineConfig, run: Run, *, stage: Stage, work: Work, sets: tuple[Any, Any]
) -> Any:
    """Train ``work.model`` in place; it ends as the best of its evaluations.

    Args:
        verb: "sft", "dpo" or "reward".
        config: of the run.
        run: its directory.
        stage: its row of the table.
        work: the stage made ready.
        sets: examples to train on, and held-out ones.

    Returns:
        The model.

    Raises:
        UserError: an option that the engine does not have, or training diverged.
    """
    options = native_options(verb, config.trainer, learning_rate=stage.learning_rate)
    lesson = open_lesson(TASKS[verb], config, options, work=work, sets=sets)
    folder = run.directory / "checkpoints"
    found = latest_checkpoint(folder) if config.resume else None
    with StopRequest() as stop:
        if lesson.task.reference:
            lesson.references = references_of(lesson, run, folder / "reference.pt")
        if found:
            load_checkpoint(
                found,
                policy=lesson.learner,
                optimizer=lesson.optimizer,
                scheduler=lesson.scheduler,
                stateful={"progress": lesson.progress},
            )
            run.rewind(lesson.progress.step)
        else:
            run.rewind(-1)
            run.log(0, evaluate(lesson))
        _steps(lesson, run, stop)
        stop.check(run.directory)
    lesson.world.wait()
    load_weights(folder / "best.pt", lesson.learner)
    return lesson.learner.model


def open_lesson(
    task: Task, config: OfflineConfig, options: NativeOptions, *, work: Work, sets: tuple[Any, Any]
) -> Lesson:
    """The model with its optimizer and schedule, and the examples as the task takes them."""
    train_set, eval_set = ([task.example(row) for row in rows] for rows in sets)
    steps = num_steps(config, len(train_set))
    learner = task.learner(work.model, work.tokenizer)
    optimizer = MasterAdamW(
        learner.parameters(),
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
    )
    warmup = min(10, steps // 10) if options.warmup_steps is None else options.warmup_steps
    scheduler = get_scheduler(
        options.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
    schedule = Schedule(len(train_set), config.batch_size, steps, config.seed)
    return Lesson(
        task, learner, options, config, join(), optimizer, scheduler, schedule, train_set, eval_set
    )


def _steps(lesson: Lesson, run: Run, stop: StopRequest) -> None:
    """All steps that are left, with evaluations and checkpoints on the way."""
    progress, total = lesson.progress, lesson.schedule.num_steps
    every = max(1, total // lesson.config.evaluations)
    often = lesson.options.logging_steps or max(1, min(10, total // 20))
    told: dict[str, float] = {}
    with Reporter(run.directory.name, total, start=progress.step) as bar:
        tally, norms, tokens = Tally(), [], 0
        while progress.step < total and not stop.asked and not _patience_is_over(lesson):
            found, norm, count = learn(lesson)
            tally, norms, tokens = tally + found, [*norms, norm], tokens + count
            progress.step += 1
            due = progress.step % every == 0 or progress.step == total
            metrics: dict[str, float] = {}
            if progress.step % often == 0 or due:
                metrics = _named("train", tally) | {
                    "train/grad_norm": float(np.mean(norms)),
                    "train/learning_rate": lesson.scheduler.get_last_lr()[0],
                    "train/tokens": tokens,
                }
                tally, norms, tokens = Tally(), [], 0
            if due:
                metrics |= evaluate(lesson)
                _keep_best(lesson, run, metrics["eval/loss"])
            if metrics:
                run.log(progress.step, metrics)
            told |= {key: metrics[key] for key in SHOWN if key in metrics}
            bar.show(progress.step, told)
            if due or stop.asked:
                _save(lesson, run)


def learn(lesson: Lesson) -> tuple[Tally, float, int]:
    """One optimizer step: (what it told, gradient norm, tokens of the examples)."""
    learner, chosen = lesson.learner, lesson.schedule.rows(lesson.progress.step)
    batch = _batch(lesson, "train", chosen)
    torch.manual_seed(lesson.config.seed + lesson.progress.step)  # adapters' dropout
    learner.model.train()
    count, total = lesson.task.count(batch), Tally()
    for part in _portions(lesson, batch):
        loss, told = lesson.task.loss(learner, part, count=count, **_own(lesson))
        loss.backward()
        total = total + told
    parameters = learner.parameters()
    lesson.world.add_gradients(parameters)
    norm = clip_gradients(parameters, lesson.options.max_grad_norm)
    if not math.isfinite(norm):
        raise UserError(
            f"training diverged in step {lesson.progress.step + 1}: the gradient is not finite; "
            "lower trainer.learning_rate and continue from the last checkpoint with --resume"
        )
    lesson.optimizer.step()
    lesson.scheduler.step()
    lesson.optimizer.zero_grad(set_to_none=True)
    told = sum(lesson.world.gather(total), Tally())
    return told, norm, int(batch.attention_mask.sum())


@torch.no_grad()
def evaluate(lesson: Lesson) -> dict[str, float]:
    """Metrics on the held-out examples."""
    lesson.learner.model.eval()
    total = Tally()
    for rows in _chunks(range(len(lesson.eval_set)), lesson.config.batch_size):
        batch = _batch(lesson, "eval", rows)
        for part in _portions(lesson, batch):
            count = lesson.task.count(part)
            total = total + lesson.task.loss(lesson.learner, part, count=count, **_own(lesson))[1]
    return _named("eval", sum(lesson.world.gather(total), Tally()))


@torch.no_grad()
def references_of(lesson: Lesson, run: Run, path: Path) -> dict[str, list[Tensor]]:
    """[rows, length] log-probabilities of every example that is used, before any step.

    The portions are those of the first epoch, so that the first loss is ln 2 to the bit; they are
    kept in a file, so that a resumed run has the same.
    """
    if path.exists() and lesson.config.resume:
        return torch.load(path, weights_only=True)
    log.info("log-probabilities of the reference, once for all epochs")
    lesson.learner.model.eval()
    schedule = lesson.schedule
    per_epoch = math.ceil(schedule.num_rows / schedule.batch_size)
    steps = range(min(schedule.num_steps, per_epoch))
    batches = {
        "train": [schedule.rows(step) for step in steps],
        "eval": list(_chunks(range(len(lesson.eval_set)), lesson.config.batch_size)),
    }
    found: dict[str, list[Tensor]] = {}
    for name, parts in batches.items():
        size = len(lesson.train_set) if name == "train" else len(lesson.eval_set)
        table = [torch.zeros(0)] * size
        for rows in parts:
            batch = _batch(lesson, name, rows, plain=True)
            scored = torch.zeros(batch.tokens.shape, dtype=lesson.learner.precise)
            for places in _places(lesson, batch):
                part = batch.rows(places)
                width = part.tokens.shape[1]
                scored[places, :width] = lesson.learner.score(
                    part.tokens, part.attention_mask, part.action_mask, with_entropy=False
                ).logprobs.cpu()
            lesson.world.add([scored])
            for place, row in enumerate(rows):
                mine = (batch.units == place).cpu()
                width = int(batch.attention_mask[mine].sum(1).max())
                table[row] = scored[mine, :width].clone()
        found[name] = table
    if run.writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path)
    return found


def _batch(lesson: Lesson, name: str, rows: Sequence[int], *, plain: bool = False) -> Examples:
    """Some examples of a set as tensors, with the reference's log-probabilities if it has them."""
    examples = lesson.train_set if name == "train" else lesson.eval_set
    learner = lesson.learner
    references = None if plain or not lesson.references else lesson.references[name]
    return collate(
        [examples[row] for row in rows],
        pad_id=learner.tokenizer.pad_token_id,
        device=learner.device,
        references=references and [references[row] for row in rows],
    )


def _places(lesson: Lesson, batch: Examples) -> list[Tensor]:
    """Rows of this process's portions of a batch."""
    parts = micro_batches(
        batch.tokens,
        batch.attention_mask,
        batch.units.tolist(),
        max_tokens=lesson.config.micro_batch_size * lesson.config.max_length,
        packs=lesson.learner.packs,
    )
    device = lesson.learner.device
    return [torch.tensor(rows, device=device) for rows in lesson.world.mine(parts)]


def _portions(lesson: Lesson, batch: Examples) -> Iterable[Examples]:
    return (batch.rows(places) for places in _places(lesson, batch))


def _chunks(rows: range, size: int) -> Iterable[list[int]]:
    return (list(rows[start : start + size]) for start in range(0, len(rows), size))


def _own(lesson: Lesson) -> dict[str, Any]:
    """The options of the loss."""
    return {name: getattr(lesson.options, name) for name in lesson.task.settings}


def _named(split: str, tally: Tally) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in tally.compute().items()}


def _patience_is_over(lesson: Lesson) -> bool:
    patience = lesson.config.patience
    return patience is not None and lesson.progress.since >= patience


def _keep_best(lesson: Lesson, run: Run, loss: float) -> None:
    progress = lesson.progress
    if loss < progress.best:
        progress.best, progress.since = loss, 0
        if run.writes:
            save_weights(run.directory / "checkpoints" / "best.pt", lesson.learner)
    else:
        progress.since += 1


def _save(lesson: Lesson, run: Run) -> None:
    if run.writes:
        save_checkpoint(
            run.directory / "checkpoints",
            step=lesson.progress.step,
            policy=lesson.learner,
            optimizer=lesson.optimizer,
            scheduler=lesson.scheduler,
            stateful={"progress": lesson.progress},
        )
