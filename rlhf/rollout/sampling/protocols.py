"""How tokens of several rows pass through a model, and what a cache and a decoder offer for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Pass:
    """Some of the rows, as places in a list of them, and the tokens each of them takes."""

    places: np.ndarray
    inputs: Sequence[Sequence[int]]


class RowStore(Protocol):
    """What a decoder keeps of each row's tokens."""

    lengths: np.ndarray
    in_place: bool
    """A pass may run over a row without ``advance``: nothing of that row is changed."""

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens a row."""
        ...

    def clear(self, row: int) -> None:
        """Forget what a row has read."""
        ...

    def passes(self, rows: np.ndarray, inputs: Sequence[Sequence[int]]) -> list[Pass]:
        """Passes, in order, in which the rows can take their tokens."""
        ...

    def prepare(self, rows: ArrayLike, counts: ArrayLike) -> Any:
        """Plan a pass that appends ``counts[i]`` tokens to row ``rows[i]``."""
        ...

    def advance(self, rows: ArrayLike, counts: ArrayLike) -> None:
        """The tokens of a pass are now part of their rows."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Overwrite a row with another."""
        ...


class Decoder(Protocol):
    """Reads tokens of rows of a store."""

    def new_cache(self, rows: int) -> Any:
        """An empty store for so many episodes."""
        ...

    def __call__(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits [n, V] after the last token of each row of the store's plan."""
        ...


def read(
    decoder: Decoder,
    cache: RowStore,
    rows: np.ndarray,
    inputs: Sequence[Sequence[int]],
    device: torch.device,
) -> torch.Tensor:
    """Pass tokens of each row through the model; logits [n, V] after the last of each."""
    found: list[torch.Tensor] = []
    order: list[np.ndarray] = []
    for part in cache.passes(rows, inputs):
        slots, counts = rows[part.places], np.array([len(ids) for ids in part.inputs])
        cache.prepare(slots, counts)
        flat = [token for ids in part.inputs for token in ids]
        found.append(decoder(torch.tensor(flat, device=device), cache))
        cache.advance(slots, counts)
        order.append(part.places)
    if len(found) == 1:
        return found[0]
    # A row may take part in several passes: the last one counts.
    last = np.zeros(len(rows), dtype=np.int64)
    places = np.concatenate(order)
    last[places] = np.arange(len(places))
    return torch.cat(found)[torch.from_numpy(last).to(device)]
