"""SFT, DPO and reward models on the engine that online algorithms use.

The same packed forward pass, optimizer, processes and checkpoints as the online loop, with a fixed
data set in place of rollouts.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch

from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.metrics import MetricSums
from rlhf.config.offline import OfflineConfig
from rlhf.config.optimization import native_options
from rlhf.errors import UserError
from rlhf.models.trainable import set_dropout
from rlhf.runs.diagnostics import TrainingMonitor
from rlhf.runs.directory import Run
from rlhf.runs.interrupt import StopRequest
from rlhf.runs.progress import OFFLINE, Reporter
from rlhf.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from rlhf.training.lesson import (
    Lesson,
    batch_of,
    chunks,
    open_lesson,
    portions,
    references_of,
)
from rlhf.training.native_tasks import TASKS
from rlhf.training.stages import Stage, Work, evaluation_steps, logging_steps


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
    lesson.learner.restore(folder / "best")
    return lesson.learner.model


def _steps(lesson: Lesson, run: Run, stop: StopRequest) -> None:
    """All steps that are left, with evaluations and checkpoints on the way."""
    progress, total = lesson.progress, lesson.schedule.num_steps
    every = evaluation_steps(lesson.config, total)
    often = lesson.options.logging_steps or logging_steps(total)
    watch = TrainingMonitor(run.directory, run.config)
    with Reporter(run.directory.name, total, start=progress.step, slots=OFFLINE) as bar:
        tally, norms, tokens = MetricSums(), [], 0
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
                tally, norms, tokens = MetricSums(), [], 0
                if lesson.meter:
                    metrics |= lesson.meter.take()
            if due:
                metrics |= evaluate(lesson) | {"train/moved": lesson.movement.share()}
                _keep_best(lesson, run, metrics["eval/loss"])
            warnings = []
            if metrics:
                run.log(progress.step, metrics)
                warnings = watch.update(progress.step, metrics)
            bar.show(progress.step, metrics, warnings)
            if due or stop.asked:
                _save(lesson, run)


def learn(lesson: Lesson) -> tuple[MetricSums, float, int]:
    """One optimizer step: (what it told, gradient norm, tokens of the examples)."""
    chosen = lesson.schedule.rows(lesson.progress.step)
    batch = batch_of(lesson, "train", chosen)
    with lesson.meter.step(batch) if lesson.meter else contextlib.nullcontext():
        told, norm = _update(lesson, batch)
    return told, norm, int(batch.attention_mask.sum())


def _update(lesson: Lesson, batch: TrainingBatch) -> tuple[MetricSums, float]:
    """What a batch told, and the norm of its gradient; the model changes in place."""
    learner = lesson.learner
    torch.manual_seed(lesson.config.seed + lesson.progress.step)  # of dropout
    set_dropout(learner.model, active=lesson.dropout)
    count, total = lesson.task.count(batch), MetricSums()
    for part in portions(lesson, batch):
        loss, told = lesson.task.loss(learner, part, count=count, **_own(lesson))
        loss.backward()
        total = total + told
    lesson.world.add_gradients(learner.parameters())
    norm = lesson.optimizer.clip_gradients(lesson.options.max_grad_norm)
    if not math.isfinite(norm):
        raise UserError(
            f"training diverged in step {lesson.progress.step + 1}: the gradient is not finite; "
            "lower trainer.learning_rate and continue from the last checkpoint with --resume"
        )
    lesson.optimizer.step()
    lesson.scheduler.step()
    lesson.optimizer.zero_grad(set_to_none=True)
    return sum(lesson.world.gather(total), MetricSums()), norm


@torch.no_grad()
def evaluate(lesson: Lesson) -> dict[str, float]:
    """Metrics on the held-out examples."""
    set_dropout(lesson.learner.model, active=False)
    total = MetricSums()
    for rows in chunks(range(len(lesson.sets["eval"])), lesson.config.batch_size):
        batch = batch_of(lesson, "eval", rows)
        for part in portions(lesson, batch):
            count = lesson.task.count(part)
            total = total + lesson.task.loss(lesson.learner, part, count=count, **_own(lesson))[1]
    return _named("eval", sum(lesson.world.gather(total), MetricSums()))


def _own(lesson: Lesson) -> dict[str, Any]:
    """The options of the loss."""
    return {name: getattr(lesson.options, name) for name in lesson.task.settings}


def _named(split: str, tally: MetricSums) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in tally.compute().items()}


def _patience_is_over(lesson: Lesson) -> bool:
    patience = lesson.config.patience
    return patience is not None and lesson.progress.since >= patience


def _keep_best(lesson: Lesson, run: Run, loss: float) -> None:
    progress = lesson.progress
    if loss < progress.best:
        progress.best, progress.since = loss, 0
        if run.writes:
            save_best(run.directory / "checkpoints", lesson.learner)
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
