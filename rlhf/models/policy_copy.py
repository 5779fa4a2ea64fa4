"""A copy of the policy that samples while the policy itself is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf.models.trainable import copy_model, make_frozen


@dataclass(frozen=True)
class Snapshot:
    """The trained weights of the policy after a number of training steps."""

    version: int
    """Number of completed training steps."""
    weights: dict[str, torch.Tensor]
    """Name of each trained parameter -> a copy of its value."""


class PolicyCopy:
    """A copy of the policy's model with trained weights of its own.

    One thread trains the policy and takes snapshots, and another one samples from the copy and
    loads snapshots into it. The copy shares the weights that are not trained, such as the base
    weights of a policy with adapters.

    Args:
        model: The model in training.
    """

    def __init__(self, model: Any) -> None:
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = make_frozen(copy_model(model, shared))
        self._copied = dict(self.model.named_parameters())
        self._version: int | None = None

    @torch.no_grad()
    def snapshot(self, version: int) -> Snapshot:
        """Return a copy of the policy's trained weights; call it in the thread that trains."""
        return Snapshot(version, {name: p.clone() for name, p in self._trained.items()})

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """Replace the trained weights of the copy; call it in the thread that samples.

        A snapshot of the version that was loaded last is not copied again.
        """
        if snapshot.version == self._version:
            return
        for name, weight in snapshot.weights.items():
            self._copied[name].copy_(weight)
        self._version = snapshot.version
