"""All state of a run in one folder, written in one step.

Everything random in a step derives from the run's seed and the step's number, so beside weights and
optimizer only counters and controllers have to be kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from rlhf.common.files import atomic_path
from rlhf.models.adapters import BASE_FOLDER


class Stateful(Protocol):
    """Anything with plain-number state."""

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


class Trained(Protocol):
    """A policy, or a reward model in training."""

    device: torch.device

    def save(self, directory: Path, *, base: Path | None = None) -> None: ...

    def restore(self, directory: Path) -> None: ...


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    policy: Trained,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    stateful: Mapping[str, Stateful],
) -> None:
    """Write ``directory/step-N``, then remove older ones.

    The folder is one that transformers (of adapters: PEFT) opens, with the state of the run beside
    the weights. It is filled under another name and renamed at the end: a process killed in the
    middle leaves the previous checkpoint whole.
    """
    target = directory / f"step-{step}"
    with atomic_path(target) as partial:
        partial.mkdir()
        policy.save(partial, base=directory / BASE_FOLDER)
        torch.save(
            {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()},
            partial / "optimizer.pt",
        )
        state = {"step": step} | {name: item.state_dict() for name, item in stateful.items()}
        (partial / "state.json").write_text(json.dumps(state, indent=2))
    for old in directory.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def save_best(directory: Path, policy: Trained) -> None:
    """Write ``directory/best``, the model alone, in place of an older one.

    A process killed in the middle resumes from a checkpoint before this evaluation, and writes the
    folder again.
    """
    with atomic_path(directory / "best") as partial:
        policy.save(partial, base=directory / BASE_FOLDER)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = sorted(directory.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    return found[-1] if found else None


def load_checkpoint(
    checkpoint: Path,
    *,
    policy: Trained,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    stateful: Mapping[str, Stateful],
) -> int:
    """Restore everything in place.

    Returns:
        The number of finished steps.
    """
    policy.restore(checkpoint)
    saved = torch.load(checkpoint / "optimizer.pt", map_location=policy.device, weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    state = json.loads((checkpoint / "state.json").read_text())
    for name, item in stateful.items():
        item.load_state_dict(state[name])
    return state["step"]
