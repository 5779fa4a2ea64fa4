"""Interfaces of caches and decoders, and a function that passes new tokens through a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Pass:
    """One forward pass: indices of rows in a list, and the new tokens of each."""

    indices: np.ndarray
    inputs: Sequence[Sequence[int]]


class RowStore:
    """Cache of the tokens of several rows.

    Args:
        rows: number of episodes held at once.
    """

    in_place = False
    """Whether a pass without ``advance`` leaves the rows unchanged."""

    def __init__(self, rows: int) -> None:
        self.lengths = np.zeros(rows, dtype=np.int64)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens in every row, unless the model allocates its caches."""

    def clear(self, row: int) -> None:
        """Empty a row."""
        self.lengths[row] = 0

    def passes(self, rows: np.ndarray, inputs: Sequence[Sequence[int]]) -> list[Pass]:
        """Split new tokens of rows into forward passes, in order; one pass if possible."""
        return [Pass(np.arange(len(rows)), inputs)]

    def prepare(self, rows: ArrayLike, counts: ArrayLike) -> Any:
        """Plan a pass that appends ``counts[i]`` tokens to row ``rows[i]``."""
        raise NotImplementedError

    def advance(self, rows: ArrayLike, counts: ArrayLike) -> None:
        """Add the new tokens of a pass to their rows."""
        self.lengths[np.asarray(rows)] += np.asarray(counts)

    def copy(self, source: int, target: int) -> None:
        """Copy row ``source`` to row ``target``."""
        self.lengths[target] = self.lengths[source]


class Decoder(Protocol):
    """Forward pass over the rows of a cache."""

    def new_cache(self, rows: int) -> Any:
        """Make an empty cache for ``rows`` episodes."""
        ...

    def __call__(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Return the logits [n, V] after the last new token of each row of the current pass."""
        ...


def forward_new_tokens(
    decoder: Decoder,
    cache: RowStore,
    rows: np.ndarray,
    inputs: Sequence[Sequence[int]],
    device: torch.device,
) -> torch.Tensor:
    """Pass new tokens through the model; return the logits [n, V] after each row's last token."""
    logits: list[torch.Tensor] = []
    order: list[np.ndarray] = []
    for forward in cache.passes(rows, inputs):
        slots, counts = rows[forward.indices], np.array([len(ids) for ids in forward.inputs])
        cache.prepare(slots, counts)
        flat = [token for ids in forward.inputs for token in ids]
        logits.append(decoder(torch.tensor(flat, device=device), cache))
        cache.advance(slots, counts)
        order.append(forward.indices)
    if len(logits) == 1:
        return logits[0]
    # A row may be part of several passes; the logits of the last one are returned.
    last = np.zeros(len(rows), dtype=np.int64)
    indices = np.concatenate(order)
    last[indices] = np.arange(len(indices))
    return torch.cat(logits)[torch.from_numpy(last).to(device)]
