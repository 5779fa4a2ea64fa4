"""Checkpoints: the whole state of a run in one folder, written atomically.

Everything random in a step derives from the run's seed and the step's number. Besides weights,
optimizer and scheduler, a checkpoint therefore keeps only counters and controllers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from rlhf.common.files import atomic_path
from rlhf.models.adapters import BASE_FOLDER
from rlhf.training.trainer import SavedModel, Trainer


def save_checkpoint(directory: Path, trainer: Trainer) -> None:
    """Write ``directory/step-N``, then remove older checkpoints.

    Transformers (or PEFT, for adapters) can load the folder; it also holds the state of the run. It
    is written under a temporary name and renamed at the end, so that a process that is killed
    leaves the previous checkpoint intact.
    """
    step = trainer.progress.step
    target = directory / f"step-{step}"
    with atomic_path(target) as partial:
        partial.mkdir()
        trainer.model.save(partial, base=directory / BASE_FOLDER)
        optimizer, scheduler = trainer.optimizer.state_dict(), trainer.scheduler.state_dict()
        torch.save({"optimizer": optimizer, "scheduler": scheduler}, partial / "optimizer.pt")
        stateful = trainer.state()
        state = {"step": step} | {name: item.state_dict() for name, item in stateful.items()}
        (partial / "state.json").write_text(json.dumps(state, indent=2))
    for old in directory.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def save_best(directory: Path, model: SavedModel) -> None:
    """Replace ``directory/best``, which holds only the model.

    A process that is killed here resumes from a checkpoint before this evaluation, and writes the
    folder again.
    """
    with atomic_path(directory / "best") as partial:
        model.save(partial, base=directory / BASE_FOLDER)


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    steps = sorted(directory.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    return steps[-1] if steps else None


def load_checkpoint(checkpoint: Path, trainer: Trainer) -> None:
    """Restore in place what ``save_checkpoint`` wrote."""
    device = trainer.model.device
    trainer.model.restore(checkpoint)
    saved = torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True)
    trainer.optimizer.load_state_dict(saved["optimizer"])
    trainer.scheduler.load_state_dict(saved["scheduler"])
    state = json.loads((checkpoint / "state.json").read_text())
    for name, item in trainer.state().items():
        item.load_state_dict(state[name])
