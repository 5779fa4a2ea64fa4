"""Checkpoints: the whole state of a run in one folder, written atomically.

Everything random in a step derives from the run's seed and the step's number. Besides weights,
optimizer and scheduler, a checkpoint therefore keeps only counters and controllers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from rlhf.common.files import atomic_path
from rlhf.models.adapters import BASE_FOLDER


class Stateful(Protocol):
    """An object whose state JSON can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class SavedModel(Protocol):
    """A policy or a reward model in training."""

    model: Any
    """The module of transformers."""
    tokenizer: Any
    device: torch.device

    def save(self, directory: Path, *, base: Path | None = None) -> None: ...

    def restore(self, directory: Path) -> None: ...


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    model: SavedModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    stateful: Mapping[str, Stateful],
) -> None:
    """Write ``directory/step-N``, then remove older checkpoints.

    Transformers (or PEFT, for adapters) can load the folder; it also holds the state of the run. It
    is written under a temporary name and renamed at the end, so that a process that is killed
    leaves the previous checkpoint intact.

    Args:
        directory: Folder of the run's checkpoints.
        step: Number of finished steps.
        model: Model with its weights.
        optimizer: Optimizer.
        scheduler: Learning rate schedule.
        stateful: Further objects to save, by name.
    """
    target = directory / f"step-{step}"
    with atomic_path(target) as partial:
        partial.mkdir()
        model.save(partial, base=directory / BASE_FOLDER)
        torch.save(
            {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()},
            partial / "optimizer.pt",
        )
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


def load_checkpoint(
    checkpoint: Path,
    *,
    model: SavedModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    stateful: Mapping[str, Stateful],
) -> int:
    """Restore in place what ``save_checkpoint`` wrote, and return the number of finished steps."""
    model.restore(checkpoint)
    saved = torch.load(checkpoint / "optimizer.pt", map_location=model.device, weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    state = json.loads((checkpoint / "state.json").read_text())
    for name, item in stateful.items():
        item.load_state_dict(state[name])
    return state["step"]
