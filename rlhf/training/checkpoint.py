"""Write and read checkpoints. A checkpoint is a folder with the whole state of a run.

All random numbers of a step are derived from the run's seed and the step number. A checkpoint
therefore contains only weights, optimizer, scheduler, counters, controllers, and the replies that
were sampled but not trained on yet.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch

from rlhf.common.files import add_path_to_write_errors, atomic_path
from rlhf.errors import UserError, first_line
from rlhf.models.adapters import BASE_FOLDER, copy_base_to_final
from rlhf.models.sharding.processes import shared_atomic_path
from rlhf.runs.alarms import Halt
from rlhf.runs.checksums import (
    DamagedFolderError,
    list_files_without_checksum,
    verify_checksums,
    write_checksums,
)
from rlhf.runs.claim import remove_written_files
from rlhf.training.distributed import World
from rlhf.training.optimizer_checkpoint import (
    load_optimizer_by_parameter,
    save_optimizer_by_parameter,
)
from rlhf.training.trainer import Trainer

log = logging.getLogger(__name__)

_FORM_ERRORS = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    EOFError,
    struct.error,
    UnpicklingError,
)
"""Errors in loading a file that is not of the expected form."""


def save_checkpoint(directory: Path, trainer: Trainer, *, keep: int) -> None:
    """Write or replace the checkpoint ``directory/step-N``, then remove older checkpoints.

    Transformers (or PEFT, for adapters) can load the folder, which also contains the state of the
    run. The folder is written under a temporary name and then renamed, so that the previous
    checkpoint stays intact if the process is killed. Checksums detect files that are damaged later.

    Args:
        directory: Folder of the run's checkpoints.
        trainer: The trainer after N steps.
        keep: Number of the newest checkpoints to keep, at least 1.
    """
    step = trainer.progress.step
    with _replace_folder_with_checksums(directory / f"step-{step}", trainer.world) as partial:
        trainer.model.save(partial, base=directory / BASE_FOLDER)
        if trainer.config.sharding == "none":
            optimizer, scheduler = trainer.optimizer.state_dict(), trainer.scheduler.state_dict()
            with (partial / "optimizer.pt").open("wb") as file:
                torch.save({"optimizer": optimizer, "scheduler": scheduler}, file)
        else:
            save_optimizer_by_parameter(partial, trainer)
        if _writes_unsharded_files(trainer.world):
            stateful = trainer.stateful_objects()
            state = {"step": step} | {name: item.state_dict() for name, item in stateful.items()}
            (partial / "state.json").write_text(json.dumps(state, indent=2))
            trainer.save_unfinished_work(partial)
    if _writes_unsharded_files(trainer.world):
        remove_all_but_newest_and_best(checkpoints_in(directory), keep=keep)


def _writes_unsharded_files(world: World) -> bool:
    """Return whether this process writes the files that are not sharded.

    If the model is not sharded, only one process saves it, and the result is True.
    """
    return not world.sharded_model or world.rank == 0


@contextlib.contextmanager
def _replace_folder_with_checksums(target: Path, world: World) -> Iterator[Path]:
    """Return a context manager with a new folder, which replaces ``target`` at the end.

    The folder gets checksums and the files of the user in ``target``. If the model is sharded,
    every process enters the context manager.
    """
    with (
        world.lost_process_guard(),
        (shared_atomic_path if world.sharded_model else atomic_path)(target) as partial,
    ):
        partial.mkdir(exist_ok=world.sharded_model)
        yield partial
        world.barrier_if_sharded()
        if _writes_unsharded_files(world):
            write_checksums(partial)
            for file in list_files_without_checksum(target):  # a file of the user stays
                copy = partial / file.relative_to(target)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy, follow_symlinks=False)


def remove_all_but_newest_and_best(
    checkpoints: list[Path], *, keep: int, best: str | None = None
) -> None:
    """Remove checkpoints, except the last ``keep`` and the one whose folder is named ``best``.

    Args:
        checkpoints: Folders of all checkpoints, in order of their step.
        keep: Number of checkpoints to keep, at least 1.
        best: Name of a folder to keep in addition.
    """
    for checkpoint in checkpoints[:-keep]:
        if checkpoint.name != best:
            remove_written_files(checkpoint)


def save_best_model(directory: Path, trainer: Trainer) -> None:
    """Write the model to ``directory/best``, replacing the earlier best model.

    If the process is killed during the replacement, the resumed run starts from a checkpoint before
    this evaluation and writes the folder again.
    """
    with _replace_folder_with_checksums(directory / "best", trainer.world) as partial:
        trainer.model.save(partial, base=directory / BASE_FOLDER)


def save_final_model(trainer: Trainer, directory: Path, final: Path) -> None:
    """Write the trained model to the folder ``final``.

    For adapters, the base model that was saved in ``directory`` is copied to ``final``. Checksums
    are written, but not for files of the user that ``final`` contains.
    """
    foreign: list[Path] = []
    if _writes_unsharded_files(trainer.world):
        foreign = list_files_without_checksum(final)
        copy_base_to_final(directory, final)
    with trainer.world.lost_process_guard(), add_path_to_write_errors(final):
        final.mkdir(exist_ok=True)  # raises an error if the user has a file of this name
        trainer.world.barrier_if_sharded()  # the copy exists in every process
        trainer.save(final)
        if _writes_unsharded_files(trainer.world):
            write_checksums(final, exclude=foreign)


def remove_damaged_and_find_latest(directory: Path, pattern: str = "step-*") -> Path | None:
    """Return the newest checkpoint that is not damaged, or None if there is no checkpoint.

    Damaged checkpoints that are newer than the returned checkpoint are logged and removed.

    Args:
        directory: Folder of the run's checkpoints.
        pattern: Glob pattern of the checkpoints' names, which end with a hyphen and the step.

    Raises:
        UserError: There are checkpoints, and all of them are damaged.
    """
    checkpoints = checkpoints_in(directory, pattern)
    damaged = []
    for checkpoint in reversed(checkpoints):
        try:
            verify_checksums(checkpoint)
        except DamagedFolderError as error:
            damaged.append((checkpoint, error))
            continue
        for path, error in damaged:
            log.warning("%s; using the previous checkpoint instead", error)
            remove_written_files(path)
        return checkpoint
    if damaged:
        raise UserError(
            f"{damaged[0][1]}, and there is no undamaged checkpoint; start a new run with "
            "--overwrite"
        )
    return None


def checkpoints_in(directory: Path, pattern: str = "step-*") -> list[Path]:
    """Return the checkpoints in ``directory`` in order of their step.

    Folders whose names match the pattern but do not end with the step, such as step-4-copy, are
    omitted.
    """
    named = ((re.fullmatch(r"[a-z]+-(\d+)", path.name), path) for path in directory.glob(pattern))
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def load_checkpoint(checkpoint: Path, trainer: Trainer) -> None:
    """Restore the state of ``trainer``, in place, from a folder that `save_checkpoint` wrote.

    Raises:
        UserError: The checkpoint is that of another run, or a file has an unexpected form although
            its checksum is right.
    """
    try:
        _restore_state(checkpoint, trainer)
    except Exception as error:
        raise_if_checkpoint_unfit(error, checkpoint, trainer.world)
        raise


def raise_if_checkpoint_unfit(error: Exception, checkpoint: Path, world: World) -> None:
    """Raise UserError if an error in loading a checkpoint shows that it does not fit the run.

    Return for other errors, such as a lack of memory or the possible loss of another process.
    """
    may_be_lost_process = isinstance(error, RuntimeError) and world.size > 1
    if isinstance(error, _FORM_ERRORS) and not (
        isinstance(error, torch.OutOfMemoryError | UserError) or may_be_lost_process
    ):
        raise UserError(
            f"{checkpoint} does not fit this run ({type(error).__name__}: {first_line(error)}): it "
            "is the checkpoint of another run, or was changed; remove it to continue from the one "
            "before"
        ) from error


def _restore_state(checkpoint: Path, trainer: Trainer) -> None:
    """Load all parts of a checkpoint into the trainer, then apply changed settings."""
    device = trainer.model.device
    trainer.model.restore(checkpoint)
    if trainer.config.sharding == "none":
        saved = torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True)
        trainer.optimizer.load_state_dict(saved["optimizer"])
        trainer.scheduler.load_state_dict(saved["scheduler"])
    else:
        with trainer.world.lost_process_guard():
            load_optimizer_by_parameter(checkpoint, trainer)
    # The error of `read_json` is a UserError, which `load_checkpoint` would not explain.
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    for name, item in trainer.stateful_objects().items():
        item.load_state_dict(state[name])
    trainer.load_unfinished_work(checkpoint)
    trainer.override_loaded_settings()


def save_evidence(folder: Path, trainer: Trainer, halt: Halt) -> None:
    """Write the data that are needed to repeat the check of an alarm.

    If the check precedes an update, a checkpoint with the state before the update is written too.

    Args:
        folder: Folder to create.
        trainer: The trainer at the time of the alarm.
        halt: The alarm that ended the run.
    """
    if _writes_unsharded_files(trainer.world):
        folder.mkdir(exist_ok=True)
        if halt.evidence:
            torch.save(halt.evidence, folder / "evidence.pt")
    if "rows" in halt.evidence:
        save_checkpoint(folder, trainer, keep=1)
