"""Checkpoints of the trainers of TRL and transformers.

These trainers write a checkpoint file by file, and this package writes the checksums afterwards. A
checkpoint without checksums is therefore treated as incomplete: the run may have been killed while
it was written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.common.files import read_json, remove, write_text
from rlhf.errors import UserError
from rlhf.runs.checksums import (
    CHECKSUMS_FILE,
    DamagedFolderError,
    verify_checksums,
    write_checksums,
)
from rlhf.training.checkpoint import (
    checkpoints_in,
    remove_all_but_newest_and_best,
    remove_damaged_and_find_latest,
)

CHECKPOINT_PATTERN = "checkpoint-*"
_UNLOGGED_FILE = "unlogged_metrics.json"
"""Name of the file in a checkpoint with the metrics of steps that are not logged yet."""


def write_checksums_and_remove_older(checkpoint: Path, *, keep: int, best: str | None) -> None:
    """Write the checksums of a checkpoint, then remove older checkpoints.

    Args:
        checkpoint: Folder of the newest checkpoint.
        keep: Number of the newest checkpoints to keep, at least 1.
        best: Path of the best checkpoint, which is kept in addition; None if there is none.
    """
    write_checksums(checkpoint)
    remove_older_checkpoints(checkpoint.parent, keep=keep, best=best)


def remove_older_checkpoints(directory: Path, *, keep: int, best: str | None) -> None:
    """Remove the checkpoints in a folder, except the last ``keep`` and the one at ``best``."""
    name = Path(best).name if best else None
    remove_all_but_newest_and_best(
        checkpoints_in(directory, CHECKPOINT_PATTERN), keep=keep, best=name
    )


def remove_incomplete_and_find_last(directory: Path) -> Path | None:
    """Return the newest complete and undamaged checkpoint, or None if there is no complete one.

    All checkpoints without checksums, and the damaged ones newer than the result, are removed.

    Raises:
        UserError: There are complete checkpoints, and all of them are damaged.
    """
    for checkpoint in checkpoints_in(directory, CHECKPOINT_PATTERN):
        if not (checkpoint / CHECKSUMS_FILE).exists():
            remove(checkpoint)
    return remove_damaged_and_find_latest(directory, CHECKPOINT_PATTERN)


def best_checkpoint_recorded_in(checkpoint: Path) -> Path | None:
    """Return the best checkpoint that ``checkpoint`` records, or None if it records none.

    Only the name of the recorded absolute path is used, because the run may have been moved.

    Raises:
        UserError: The best checkpoint is damaged or missing.
    """
    state = read_json(checkpoint / "trainer_state.json")
    recorded = state.get("best_model_checkpoint")
    if not recorded:
        return None
    best = checkpoint.parent / Path(recorded).name
    try:
        verify_checksums(best)
    except DamagedFolderError as error:
        raise UserError(
            f"{error}, and it is part of the checkpoint with the lowest held-out loss; start a new "
            "run with --overwrite"
        ) from error
    return best


def save_unlogged_metrics(trainer: Any, checkpoint: Path) -> None:
    """Write the loss and the metrics of the steps since the last logged step, if there are any.

    A trainer logs their means at the next logged step, but does not save them.

    Args:
        trainer: A trainer of TRL or transformers.
        checkpoint: Folder of the checkpoint that the trainer has written.
    """
    if trainer.state.global_step > trainer._globalstep_last_logged:
        unlogged = {
            "last_logged_step": trainer._globalstep_last_logged,
            "loss": trainer._tr_loss.item(),
            "metrics": _metrics_of_training(trainer),
        }
        write_text(checkpoint / _UNLOGGED_FILE, json.dumps(unlogged))


def load_unlogged_metrics(trainer: Any, checkpoint: Path) -> None:
    """Restore what `save_unlogged_metrics` wrote, after the trainer has begun to train."""
    if (checkpoint / _UNLOGGED_FILE).exists():
        unlogged = read_json(checkpoint / _UNLOGGED_FILE)
        trainer._globalstep_last_logged = unlogged["last_logged_step"]
        trainer._tr_loss.fill_(unlogged["loss"])
        _metrics_of_training(trainer).update(unlogged["metrics"])


def _metrics_of_training(trainer: Any) -> dict[str, list[float]]:
    """Return the unlogged metrics of one of TRL's trainers; transformers' trainer has none."""
    return getattr(trainer, "_metrics", {"train": {}})["train"]
