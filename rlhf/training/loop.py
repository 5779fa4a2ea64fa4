"""The training loop of the online algorithms and of the native engine for offline methods."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from rlhf.errors import UserError
from rlhf.rollout.sampling.base import EngineStopped
from rlhf.runs.alarms import HALTED_FOLDER, Halt, log_halt_data_write_errors
from rlhf.runs.checksums import DamagedFolderError, verify_checksums
from rlhf.runs.claim import remove_written_files
from rlhf.runs.diagnostics import TrainingMonitor
from rlhf.runs.directory import Run
from rlhf.runs.interrupt import StopSignalRecorder
from rlhf.runs.progress import ProgressDisplay
from rlhf.training.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    remove_all_but_newest_and_best,
    remove_damaged_and_find_latest,
    save_best_model,
    save_checkpoint,
    save_evidence,
    save_final_model,
)
from rlhf.training.numeric_checks import check_weights_are_finite
from rlhf.training.resumption import check_step_count, log_changes
from rlhf.training.trainer import Trainer

log = logging.getLogger(__name__)


def fit(trainer: Trainer, run: Run) -> Path:
    """Train from the start or from the last checkpoint until training is done.

    Metrics, checkpoints and the final model are written to the run directory.

    Returns:
        The folder of the final model.

    Raises:
        UserError: An environment or a reward failed, or a checkpoint cannot be loaded.
        Halt: An alarm with the action halt occurred. The data that are needed to repeat the check
            of the alarm are in the run directory.
        Interrupted: The user stopped the run; a checkpoint was saved.
    """
    checkpoints = run.directory / "checkpoints"
    with StopSignalRecorder() as stop:
        trainer.prepare_before_resuming(run)
        _resume_or_start(trainer, run, checkpoints)
        if number := _signal_of_any_process(trainer, stop):
            _raise_interrupted(trainer, run, stop, number)
        if run.writes:
            with contextlib.suppress(OSError):
                remove_written_files(run.directory / HALTED_FOLDER)
        try:
            _take_steps(trainer, run, stop, checkpoints)
        except Halt as halt:
            if _takes_part_in_saving(trainer, run):
                with log_halt_data_write_errors(run.directory, halt):
                    save_evidence(run.directory / HALTED_FOLDER, trainer, halt)
            raise
    trainer.world.barrier()
    if trainer.final_is_best and trainer.progress.best_loss < math.inf:
        _verify_best_model(checkpoints / "best")
        trainer.model.restore(checkpoints / "best")
    elif trainer.final_is_best:
        log.warning("no evaluation had a finite loss, so the final model is that of the last step")
    if _takes_part_in_saving(trainer, run):
        save_final_model(trainer, checkpoints, run.final)
    try:
        trainer.evaluate_final_model(run)
    except UserError as error:
        error.args = (
            f"{error} (the trained model is in {run.final}; repeat its evaluation with --resume)",
        )
        raise
    trainer.notify("on_end", run, folder=run.final)
    return run.final


def _resume_or_start(trainer: Trainer, run: Run, checkpoints: Path) -> None:
    """Restore the last checkpoint of a resumed run, or start a new run.

    Metrics and transcripts that were logged after the checkpoint are deleted.
    """
    latest = None
    if trainer.config.resume:  # only one process removes damaged checkpoints
        found = remove_damaged_and_find_latest(checkpoints) if run.writes else None
        latest = trainer.world.first_not_none(found)
    if latest is None:
        run.record_changes_and_reopen(0)
        run.rewind(-1)
        trainer.evaluate_initial_model(run)
        return
    load_checkpoint(latest, trainer)
    if trainer.keep_best and trainer.progress.best_loss < math.inf:
        try:
            _verify_best_model(checkpoints / "best")
        except UserError as error:
            if trainer.final_is_best:
                raise
            log.warning("%s; the next evaluation counts as the best", error.__cause__)
            trainer.progress.best_loss = math.inf
    if run.changes:
        _check_and_record_changes(trainer, run)
    if run.writes:  # a killed run may not have removed its older checkpoints
        remove_all_but_newest_and_best(checkpoints_in(checkpoints), keep=trainer.config.keep_last)
    run.rewind(trainer.progress.step)


def _check_and_record_changes(trainer: Trainer, run: Run) -> None:
    """Check, record and log the changed settings of a run whose checkpoint was loaded.

    A warning is logged if training ended before the last step, so that no step is added.

    Raises:
        UserError: The run has taken more steps than its configuration allows.
    """
    step = trainer.progress.step
    check_step_count(run, done=step, configured=trainer.num_steps)
    run.record_changes_and_reopen(step)
    log_changes(run, step, schedule_depends_on_steps=trainer.schedule_depends_on_steps)
    if trainer.done and step < trainer.num_steps:
        log.warning(
            "training ended at step %d, because evaluations no longer improved, the KL exceeded "
            "its budget, or a callback ended it; no step is added",
            step,
        )


def _verify_best_model(folder: Path) -> None:
    """Verify the checksums of the best model, which becomes the final model.

    Raises:
        UserError: A file is damaged or missing.
    """
    try:
        verify_checksums(folder)
    except DamagedFolderError as error:
        raise UserError(
            f"{error}, and it is part of the model with the lowest held-out loss; start a new run "
            "with --overwrite"
        ) from error


def _take_steps(trainer: Trainer, run: Run, stop: StopSignalRecorder, checkpoints: Path) -> None:
    """Take the remaining steps; evaluate, log and save at the configured intervals.

    Raises:
        Interrupted: A process received a signal; a checkpoint was saved.
    """
    progress = trainer.progress
    name, total = run.directory.name, trainer.num_steps
    with ProgressDisplay(
        name, total, num_completed=progress.step, displayed_metrics=trainer.displayed_metrics
    ) as display:
        monitor = TrainingMonitor(run.directory, run.config)
        while not trainer.done:
            try:
                metrics = trainer.step(progress.step, run)
            except Exception as error:
                if _should_save_after(error, trainer):
                    _check_weights_finite(trainer)
                    _save_checkpoint_and_notify(trainer, run, checkpoints)
                raise
            progress.step += 1
            save_due = trainer.is_checkpoint_due(progress.step)
            check_due = save_due or trainer.is_evaluation_due(progress.step) or trainer.done
            if check_due:
                _check_weights_finite(trainer)
            if trainer.is_evaluation_due(progress.step):
                try:
                    metrics |= trainer.evaluate()
                except Exception:  # the metrics of the step are logged without an evaluation
                    run.log(progress.step, metrics)
                    if not trainer.world.sharded_model:
                        _save_checkpoint_and_notify(
                            trainer, run, checkpoints, in_all_processes=trainer.world.size == 1
                        )
                    raise
                if trainer.keep_best:
                    _save_if_best(trainer, run, checkpoints, metrics)
            if save_due:
                metrics["train/moved"] = trainer.changed_tensor_fraction()
            warnings = []
            if metrics and trainer.num_without_gradient:
                metrics["train/no_gradient"] = float(trainer.num_without_gradient)
            if metrics:
                run.log(progress.step, metrics)
                warnings = monitor.update(progress.step, metrics)
            display.show(progress.step, metrics, warnings)
            trainer.notify("on_step", run, metrics=metrics)
            if trainer.is_evaluation_due(progress.step):
                trainer.notify("on_evaluation", run, metrics=metrics)
            signal_number = _signal_of_any_process(trainer, stop)
            if signal_number and not check_due:
                _check_weights_finite(trainer)
            if save_due or signal_number:
                _save_checkpoint_and_notify(trainer, run, checkpoints)
            if signal_number:
                _raise_interrupted(trainer, run, stop, signal_number)
        if warnings := monitor.finish(progress.step):
            display.show(progress.step, {}, warnings)


def _should_save_after(error: Exception, trainer: Trainer) -> bool:
    """Return whether to save a checkpoint after a failed step.

    The state must be that of the previous step. A checkpoint is useful because the cause can be
    temporary, such as a judge that does not answer. Without a previous step, there is nothing to
    lose except replies of a server. With several processes, no checkpoint is saved, because the
    other processes wait for results of the failed step.
    """
    worth_saving = trainer.progress.step > 0 or isinstance(error, EngineStopped)
    return trainer.state_is_complete and worth_saving and trainer.world.size == 1


def _signal_of_any_process(trainer: Trainer, stop: StopSignalRecorder) -> int | None:
    """Return the number of a signal that a process received, or None.

    All processes get the same result, so that a signal to one of them stops all of them after the
    same step.
    """
    return trainer.world.first_not_none(stop.number)


def _raise_interrupted(trainer: Trainer, run: Run, stop: StopSignalRecorder, number: int) -> None:
    """Raise Interrupted when all processes have arrived here after a signal to one of them.

    torchrun ends all processes when one has ended. A process that did not wait could therefore end
    another one that still writes the checkpoint.

    Raises:
        Interrupted: Always.
    """
    trainer.world.barrier()
    stop.number = number
    stop.raise_if_requested(run.directory)


def _save_checkpoint_and_notify(
    trainer: Trainer, run: Run, checkpoints: Path, *, in_all_processes: bool = True
) -> None:
    """Write the buffered metrics and a checkpoint, and call the callbacks.

    If a callback then ends training, the checkpoint is written again, because it would otherwise
    not record the end.

    Args:
        trainer: The trainer.
        run: The run directory.
        checkpoints: Folder of the checkpoints.
        in_all_processes: Whether all processes call this function. If not, the others may wait for
            another result, so no callback is called, and the model must not be sharded.
    """
    if run.writes:
        run.flush_logs()
    saves, stopped = _takes_part_in_saving(trainer, run), trainer.callbacks.stopped
    if saves:
        save_checkpoint(checkpoints, trainer, keep=trainer.config.keep_last)
    if in_all_processes:
        trainer.notify("on_checkpoint", run, folder=checkpoints / f"step-{trainer.progress.step}")
        if saves and trainer.callbacks.stopped and not stopped:
            save_checkpoint(checkpoints, trainer, keep=trainer.config.keep_last)


def _takes_part_in_saving(trainer: Trainer, run: Run) -> bool:
    """Return whether this process saves the model: the first process, or all if it is sharded."""
    return run.writes or trainer.world.sharded_model


def _check_weights_finite(trainer: Trainer) -> None:
    check_weights_are_finite(
        trainer.model.model,
        step=trainer.progress.step,
        learning_rate_key=trainer.learning_rate_key,
        world=trainer.world,
    )


def _save_if_best(
    trainer: Trainer, run: Run, checkpoints: Path, metrics: Mapping[str, float]
) -> None:
    """Record the loss of an evaluation; save the model if this is the lowest loss so far."""
    loss = trainer.model_selection_loss(metrics)
    if trainer.progress.record_evaluation(loss) and _takes_part_in_saving(trainer, run):
        save_best_model(checkpoints, trainer)
