"""Checkpoints of the trainers of TRL and transformers, which write them file by file.

Checksums are written last, so a checkpoint without them was being written when the run was killed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf.runs.checksums import CHECKSUMS, write_checksums
from rlhf.training.checkpoint import checkpoints_in, latest_checkpoint, remove_older

CHECKPOINT_PATTERN = "checkpoint-*"


def complete_checkpoint(checkpoint: Path, *, keep: int, best: str | None) -> None:
    """Write the checksums of a checkpoint, then remove older ones.

    Args:
        checkpoint: Folder of the newest checkpoint.
        keep: Number of checkpoints that are kept, at least 1.
        best: Path of the best checkpoint, which is kept too.
    """
    write_checksums(checkpoint)
    remove_older_checkpoints(checkpoint.parent, keep=keep, best=best)


def remove_older_checkpoints(directory: Path, *, keep: int, best: str | None) -> None:
    """Remove all but the last ``keep`` checkpoints and the one at the path ``best``."""
    name = Path(best).name if best else None
    remove_older(checkpoints_in(directory, CHECKPOINT_PATTERN), keep=keep, best=name)


def last_complete_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint, or None; remove incomplete ones.

    Raises:
        UserError: There are complete checkpoints, and every one is damaged.
    """
    for checkpoint in directory.glob(CHECKPOINT_PATTERN):
        if not (checkpoint / CHECKSUMS).exists():
            shutil.rmtree(checkpoint)
    return latest_checkpoint(directory, CHECKPOINT_PATTERN)
