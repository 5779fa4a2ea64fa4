"""Interfaces of caches and decoders, and the forward pass of new tokens over a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class ForwardPass:
    """Rows and new tokens of one forward pass."""

    indices: np.ndarray
    """Indices in the list of rows that was split into passes."""
    inputs: Sequence[Sequence[int]]
    """New tokens of each row."""


class MultiRowCache:
    """Base class of caches with several rows, which counts the tokens of each row.

    Args:
        rows: Number of episodes in the cache.
    """

    in_place = False
    """Whether a forward pass leaves the rows unchanged if ``advance`` is not called after it."""

    def __init__(self, rows: int) -> None:
        self.lengths = np.zeros(rows, dtype=np.int64)

    def ensure_capacity(self, tokens_per_row: int) -> None:
        """Allocate memory for ``tokens_per_row`` tokens per row.

        By default, the model allocates the memory in its forward pass.
        """

    def clear(self, row: int) -> None:
        """Empty a row."""
        self.lengths[row] = 0

    def passes_of_compatible_rows(
        self, rows: np.ndarray, inputs: Sequence[Sequence[int]]
    ) -> list[ForwardPass]:
        """Split new tokens of rows into forward passes, in order. By default, there is one pass."""
        return [ForwardPass(np.arange(len(rows)), inputs)]

    def plan_forward_pass(self, rows: ArrayLike, counts: ArrayLike) -> Any:
        """Plan a forward pass that appends ``counts[i]`` tokens to row ``rows[i]``."""
        raise NotImplementedError

    def advance(self, rows: ArrayLike, counts: ArrayLike) -> None:
        """Increase the lengths of the rows by the numbers of new tokens after a forward pass."""
        self.lengths[np.asarray(rows)] += np.asarray(counts)

    def copy_row(self, source: int, target: int) -> None:
        """Copy row ``source`` to row ``target``."""
        self.lengths[target] = self.lengths[source]


class Decoder(Protocol):
    """Interface of forward passes over the rows of a cache."""

    def new_cache(self, rows: int) -> Any:
        """Make an empty cache for ``rows`` episodes."""
        ...

    def __call__(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Compute the planned forward pass. Return the logits [n, V] after each row's last token.

        Args:
            ids: New tokens [N], row after row.
            cache: A cache that ``new_cache`` made, after a call of ``plan_forward_pass``.
        """
        ...


def forward_new_tokens(
    decoder: Decoder,
    cache: MultiRowCache,
    rows: np.ndarray,
    inputs: Sequence[Sequence[int]],
    device: torch.device,
) -> torch.Tensor:
    """Compute the forward passes of new tokens, and add the tokens to the cache.

    Args:
        decoder: Decoder of the model.
        cache: Cache of the decoder.
        rows: Indices [n] of the rows in the cache.
        inputs: New tokens of each row.
        device: Device of the model.

    Returns:
        Logits [n, V] after the last new token of each row.
    """
    logits: list[torch.Tensor] = []
    order: list[np.ndarray] = []
    for forward in cache.passes_of_compatible_rows(rows, inputs):
        slots, counts = rows[forward.indices], np.array([len(ids) for ids in forward.inputs])
        cache.plan_forward_pass(slots, counts)
        flat = [token for ids in forward.inputs for token in ids]
        logits.append(decoder(torch.tensor(flat, device=device), cache))
        cache.advance(slots, counts)
        order.append(forward.indices)
    if len(logits) == 1:
        return logits[0]
    # A row can be part of several forward passes. The logits of the last of them are returned.
    last = np.zeros(len(rows), dtype=np.int64)
    indices = np.concatenate(order)
    last[indices] = np.arange(len(indices))
    return torch.cat(logits)[torch.from_numpy(last).to(device)]
