"""Decoding row by row: through a cache that the model makes, or without any.

Families whose cache has a form of its own, or whose attention counts columns, are right with one
row a pass. It is slower than rows side by side by about their number.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from rlhf.models.architecture import trunk_of
from rlhf.models.output_head import logits_of
from rlhf.rollout.sampling.protocols import Pass
from rlhf.rollout.sampling.time_step_limits import limited_mixers, limited_time_steps

# Names under which a model takes and returns what it keeps.
NAMES = ("past_key_values", "cache_params", "state")


@dataclass
class _Row:
    kept: Any = None
    tokens: list[int] = field(default_factory=list)


class RowCache:
    """What the model keeps of each of ``rows`` episodes, in the model's own form."""

    in_place = False

    def __init__(self, rows: int) -> None:
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.rows = [_Row() for _ in range(rows)]
        self.planned: list[tuple[_Row, int]] = []

    def reserve(self, tokens: int) -> None:
        """Nothing is allocated ahead."""

    def clear(self, row: int) -> None:
        """Forget what a row has read."""
        self.rows[row], self.lengths[row] = _Row(), 0

    def passes(self, rows: np.ndarray, inputs: Sequence[Sequence[int]]) -> list[Pass]:
        """One pass: rows are read one after the other in it."""
        return [Pass(np.arange(len(rows)), list(inputs))]

    def prepare(self, rows: ArrayLike, counts: ArrayLike) -> None:
        """Name the rows and counts of the pass that follows."""
        slots, numbers = np.asarray(rows).tolist(), np.asarray(counts).tolist()
        self.planned = [(self.rows[row], n) for row, n in zip(slots, numbers, strict=True)]

    def advance(self, rows: ArrayLike, counts: ArrayLike) -> None:
        """The new tokens are now part of their rows."""
        self.lengths[np.asarray(rows)] += np.asarray(counts)

    def copy(self, source: int, target: int) -> None:
        """Overwrite a row with another."""
        self.rows[target] = copy.deepcopy(self.rows[source])
        self.lengths[target] = self.lengths[source]


class RowDecoder:
    """Reads one row a pass.

    Args:
        model: a causal model.
        stepwise: tokens of a row that has read some before are read one by one.
        cached: False reads the whole row again for every token.
    """

    def __init__(self, model: Any, *, stepwise: bool = False, cached: bool = True) -> None:
        self.model, self.stepwise, self.cached = model, stepwise, cached
        self.limited = limited_mixers(trunk_of(model))

    def new_cache(self, rows: int) -> RowCache:
        """An empty cache for so many episodes."""
        return RowCache(rows)

    def __call__(self, ids: torch.Tensor, cache: RowCache) -> torch.Tensor:
        """Logits [n, V] after each row's last new token; ``ids`` are those of the plan's rows."""
        parts = ids.split([count for _, count in cache.planned])
        with limited_time_steps(self.limited):
            states = [
                self._read(row, part) for (row, _), part in zip(cache.planned, parts, strict=True)
            ]
        return logits_of(self.model, torch.stack(states))

    def _read(self, row: _Row, ids: torch.Tensor) -> torch.Tensor:
        """State [D] after the last of the tokens [L]."""
        trunk = trunk_of(self.model)
        if not self.cached:
            row.tokens += ids.tolist()
            whole = torch.tensor([row.tokens], device=ids.device)
            return trunk(input_ids=whole, use_cache=False).last_hidden_state[0, -1]
        several = self.stepwise and row.kept is not None
        for part in ids.split(1) if several else [ids]:
            given = {} if row.kept is None else {row.kept[0]: row.kept[1]}
            output = trunk(input_ids=part[None], use_cache=True, **given)
            row.kept = next((name, output[name]) for name in NAMES if output.get(name) is not None)
            last = output.last_hidden_state[0, -1]
        return last
