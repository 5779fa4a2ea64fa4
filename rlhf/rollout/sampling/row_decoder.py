"""Decode one row per forward pass, with the model's own cache or without a cache.

This decoder supports model families whose cache or attention cannot be batched. For n rows it is
about n times slower than batched decoding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from rlhf.models.architecture import trunk_of
from rlhf.models.output_head import logits_of
from rlhf.rollout.sampling.protocols import MultiRowCache
from rlhf.rollout.sampling.time_step_limits import clamped_time_steps, mixers_with_time_step_limits

# Names that the cache can have in the arguments and outputs of models.
CACHE_NAMES = ("past_key_values", "cache_params", "state")


@dataclass
class _Row:
    cache: Any = None
    """(argument name, cache) from the last output of the model; None before the first one."""
    tokens: list[int] = field(default_factory=list)
    """Tokens of the row, if no cache is used."""


class RowCache(MultiRowCache):
    """A separate cache, of the model's own class, for each of ``rows`` episodes."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.rows = [_Row() for _ in range(rows)]
        self.planned: list[tuple[_Row, int]] = []

    def clear(self, row: int) -> None:
        """Empty a row."""
        super().clear(row)
        self.rows[row] = _Row()

    def plan_forward_pass(self, rows: ArrayLike, counts: ArrayLike) -> None:
        """Set the rows and token counts of the next forward pass."""
        row_list, count_list = np.asarray(rows).tolist(), np.asarray(counts).tolist()
        self.planned = [(self.rows[row], n) for row, n in zip(row_list, count_list, strict=True)]

    def copy_row(self, source: int, target: int) -> None:
        """Copy row ``source`` to row ``target``."""
        super().copy_row(source, target)
        self.rows[target] = copy.deepcopy(self.rows[source])


class RowDecoder:
    """Decoder that computes one row per forward pass.

    Args:
        model: Causal model.
        stepwise: Whether new tokens of a row that is not empty are processed one by one.
        cached: Whether to use a cache. Without a cache, the whole row is computed again in every
            forward pass.
    """

    def __init__(self, model: Any, *, stepwise: bool = False, cached: bool = True) -> None:
        self.model, self.stepwise, self.cached = model, stepwise, cached
        self.limited = mixers_with_time_step_limits(trunk_of(model))

    def new_cache(self, rows: int) -> RowCache:
        """Make an empty cache for ``rows`` episodes."""
        return RowCache(rows)

    def __call__(self, ids: torch.Tensor, cache: RowCache) -> torch.Tensor:
        """Return the logits [n, V] after each row's last new token.

        ``ids`` are the new tokens [N], row after row.
        """
        parts = ids.split([count for _, count in cache.planned])
        with clamped_time_steps(self.limited):
            states = [
                self._last_hidden_state_of_new_tokens(row, part)
                for (row, _), part in zip(cache.planned, parts, strict=True)
            ]
        return logits_of(self.model, torch.stack(states))

    def _last_hidden_state_of_new_tokens(self, row: _Row, ids: torch.Tensor) -> torch.Tensor:
        """Process new tokens [L] of a row, and add them to it. Return the last hidden state [D]."""
        trunk = trunk_of(self.model)
        if not self.cached:
            row.tokens += ids.tolist()
            whole = torch.tensor([row.tokens], device=ids.device)
            return trunk(input_ids=whole, use_cache=False).last_hidden_state[0, -1]
        one_by_one = self.stepwise and row.cache is not None
        for part in ids.split(1) if one_by_one else [ids]:
            past = {} if row.cache is None else {row.cache[0]: row.cache[1]}
            output = trunk(input_ids=part[None], use_cache=True, **past)
            name = next(name for name in CACHE_NAMES if output.get(name) is not None)
            row.cache = name, output[name]
            last = output.last_hidden_state[0, -1]
        return last
