"""A key-value cache whose rows have lengths of their own and survive turns.

Row ``i`` holds the tokens of one episode at positions ``0 .. lengths[i]-1``: no padding between
turns or at the end of a batch, so a position is a token. New tokens of several rows pass through
the model side by side, and each is written to its own place. Layers with a window keep everything
and mask what lies before it; layers with a recurrent state keep one for each row.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

from rlhf.models.architecture import ATTENTION, BOTH, NOTHING
from rlhf.rollout.sampling.protocols import Pass
from rlhf.rollout.sampling.state_cache import StateLayer

# Columns are allocated in multiples of this.
CAPACITY_MULTIPLE = 64


@dataclass(frozen=True)
class Plan:
    """One forward pass that appends tokens to some rows: n rows, N new tokens, at most L a row."""

    reading: slice | torch.Tensor
    """Rows of the cache, as an index: a slice (read without a copy) where they are neighbours."""
    shape: tuple[int, int]  # (n, L)
    even: bool
    """Every row takes L tokens, so that nothing is padded."""
    row: torch.Tensor  # [N] which of the n rows a token belongs to
    offset: torch.Tensor  # [N] its place among the row's new tokens
    slot: torch.Tensor  # [N] row of the cache it is written to
    position: torch.Tensor  # [N]
    ends: torch.Tensor  # [n] index of each row's last new token
    mask: torch.Tensor  # [n, 1, L, width], 0 where the query may look, else the dtype's minimum
    queries: torch.Tensor  # [n, L] position of each query, padding included
    rows: np.ndarray  # [n] rows of the cache
    _masks: dict[int, torch.Tensor] = field(default_factory=dict)

    def mask_within(self, window: int | None) -> torch.Tensor:
        """``mask`` of a layer that sees no more than ``window`` tokens, the query's included."""
        width = self.mask.shape[-1]
        if window is None or width <= window:
            return self.mask
        if window not in self._masks:
            columns = torch.arange(width, device=self.mask.device)
            before = columns <= self.queries[:, None, :, None] - window
            self._masks[window] = self.mask.masked_fill(before, torch.finfo(self.mask.dtype).min)
        return self._masks[window]

    def pad(self, flat: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [n, L, ...], zeros where a row has fewer tokens."""
        if self.even:
            return flat.view(*self.shape, *flat.shape[1:])
        padded = flat.new_zeros((*self.shape, *flat.shape[1:]))
        padded[self.row, self.offset] = flat
        return padded

    def flatten(self, padded: torch.Tensor) -> torch.Tensor:
        """[n, L, ...] -> [N, ...]."""
        return padded.flatten(0, 1) if self.even else padded[self.row, self.offset]


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, capacity, heads, dim]."""

    keys: Any
    values: Any
    is_compileable = False
    is_sliding = False

    def __init__(self, cache: RaggedCache) -> None:
        super().__init__()
        # A cycle would keep gigabytes until the garbage collector happens to run.
        self.cache = weakref.proxy(cache)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate room once the first keys [N, heads, dim] show their shape."""
        room = (self.cache.rows, self.cache.capacity)
        # Zeros: what lies beyond a row is masked, but a nan would come through the mask.
        self.keys = key_states.new_zeros((*room, *key_states.shape[1:]))
        self.values = value_states.new_zeros((*room, *value_states.shape[1:]))
        self.is_initialized = True

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' keys and values [N, heads, dim] of the current plan.

        Returns:
            Keys and values of all tokens of the plan's rows, [n, heads, width, dim].
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        plan = self.cache.plan
        self.keys[plan.slot, plan.position] = keys
        self.values[plan.slot, plan.position] = values
        width = plan.mask.shape[-1]
        read = (store[plan.reading, :width].transpose(1, 2) for store in (self.keys, self.values))
        return next(read), next(read)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``append`` as transformers calls it, with padded states [n, heads, L, dim]."""
        plan = self.cache.plan
        return self.append(
            plan.flatten(key_states.transpose(1, 2)), plan.flatten(value_states.transpose(1, 2))
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: the mask is part of the plan."""
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.cache.plan.mask.shape[-1] if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Columns there is room for."""
        return self.cache.capacity

    def get_max_cache_shape(self) -> int:
        """Columns there is room for."""
        return self.cache.capacity

    def grow(self) -> None:
        """Make room for the cache's capacity."""
        if self.is_initialized:
            old = self.keys, self.values
            self.lazy_initialization(self.keys[0, :1], self.values[0, :1])
            for store, filled in zip((self.keys, self.values), old, strict=True):
                store[:, : filled.shape[1]] = filled

    def copy(self, source: int, target: int, width: int) -> None:
        """Overwrite the first ``width`` tokens of a row with another's."""
        for store in (self.keys, self.values):
            store[target, :width] = store[source, :width]


class RaggedStateLayer(StateLayer, RaggedLayer):
    """A layer with attention beside a recurrent state."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: RaggedCache, number_of_states: int) -> None:
        RaggedLayer.__init__(self, cache)
        StateLayer.__init__(self, cache.rows, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys and values, which come in order, or of states, which come by name."""
        kind: Any = RaggedLayer if args else StateLayer
        kind.lazy_initialization(self, *args, **kwargs)


class RaggedCache(Cache):
    """Keys and values, or recurrent states, of ``rows`` episodes.

    Args:
        layers: their number, where each has attention; else what each keeps, and how many states.
        rows: episodes held at once.
        dtype: of the model, which the masks take.
        device: where it lies.
        stepwise: rows that have a state read further tokens one by one, because the model drops the
            state before a longer part.
        limit: longer rows are read with other rotary frequencies, so they pass through the model
            apart; None: all are alike.
    """

    plan: Plan

    def __init__(
        self,
        layers: int | Sequence[tuple[str, int]],
        *,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        stepwise: bool = False,
        limit: int | None = None,
    ) -> None:
        self.rows, self.dtype, self.device = rows, dtype, device
        self.stepwise, self.limit = stepwise, limit
        self.capacity = 0
        self.lengths = np.zeros(rows, dtype=np.int64)
        kept = [(ATTENTION, 0)] * layers if isinstance(layers, int) else layers
        made = [self._layer(*each) for each in kept]
        self.ragged = [layer for layer in made if isinstance(layer, RaggedLayer)]
        self.states = [layer for layer in made if isinstance(layer, StateLayer)]
        self.in_place = not self.states and limit is None
        super().__init__(layers=made)

    def _layer(self, kind: str, number_of_states: int) -> Any:
        if kind == ATTENTION:
            return RaggedLayer(self)
        if kind == BOTH:
            return RaggedStateLayer(self, number_of_states)
        return DummyLayer() if kind == NOTHING else StateLayer(self.rows, number_of_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in use."""
        if self.ragged:
            return self.ragged[0].get_seq_length()
        return self.plan.mask.shape[-1] if self.lengths.any() else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of the present plan, from position 0 on."""
        return self.plan.mask.shape[-1], 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Unused: rows begin at positions of their own."""
        return 0

    def clear(self, row: int) -> None:
        """Forget what a row has read."""
        self.lengths[row] = 0

    def passes(self, rows: np.ndarray, inputs: Sequence[Sequence[int]]) -> list[Pass]:
        """Passes, in order, in which the rows can take their tokens.

        One for all of them, with two exceptions. A state cannot be padded: rows that take different
        numbers of tokens, and rows that begin, are apart. So are rows beyond ``limit``.
        """
        if self.in_place:
            return [Pass(np.arange(len(rows)), inputs)]
        groups: dict[tuple[int, ...], list[tuple[int, Sequence[int]]]] = {}
        for place, (length, ids) in enumerate(
            zip(self.lengths[rows].tolist(), inputs, strict=True)
        ):
            one_by_one = self.stepwise and length
            for step, part in enumerate([[token] for token in ids] if one_by_one else [ids]):
                read = length + step + len(part)
                long = self.limit is not None and read > self.limit
                kind = (not length, len(part)) if self.states else (False, 0)
                groups.setdefault((step, *kind, long), []).append((place, part))
        return [
            Pass(np.array([place for place, _ in group]), [ids for _, ids in group])
            for _, group in sorted(groups.items())
        ]

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in every row; at least doubles when more is needed."""
        if tokens > self.capacity:
            # Rounded up, so that one cache after another fits into the same memory.
            self.capacity = max(
                -(-tokens // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE, 2 * self.capacity
            )
            for layer in self.ragged:
                layer.grow()

    def prepare(self, rows: ArrayLike, counts: ArrayLike) -> Plan:
        """Plan a forward pass that appends ``counts[i]`` tokens to row ``rows[i]``.

        Call ``advance`` with the same arguments after the pass.
        """
        slots, number = np.asarray(rows), np.asarray(counts)
        n, longest = len(slots), int(number.max())
        row = np.repeat(np.arange(n), number)
        ends = number.cumsum()
        offset = np.arange(ends[-1]) - np.repeat(ends - number, number)
        starts = self.lengths[slots]
        neighbours = int(slots[-1] - slots[0]) == n - 1 and bool((np.diff(slots) == 1).all())
        padded = self._tensor(starts)[:, None] + torch.arange(longest, device=self.device)
        columns = torch.arange(int((starts + number).max()), device=self.device)
        hidden = columns > padded[:, None, :, None]
        nothing = torch.zeros((), dtype=self.dtype, device=self.device)
        self.plan = Plan(
            reading=slice(slots[0], slots[0] + n) if neighbours else self._tensor(slots),
            shape=(n, longest),
            even=len(row) == n * longest,
            row=self._tensor(row),
            offset=self._tensor(offset),
            slot=self._tensor(slots[row]),
            position=self._tensor(starts[row] + offset),
            ends=self._tensor(ends - 1),
            mask=torch.where(hidden, torch.finfo(self.dtype).min, nothing),
            queries=padded,
            rows=slots,
        )
        if self.states:
            assert self.plan.even, "a state cannot be padded"
            assert starts.all() or not starts.any(), "rows with and without a state"
            taking = self._tensor(slots)
            for layer in self.states:
                layer.take(taking, fresh=not starts.any())
        return self.plan

    def _tensor(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self.device)

    def advance(self, rows: ArrayLike, counts: ArrayLike) -> None:
        """The new tokens are now part of their rows."""
        self.lengths[np.asarray(rows)] += np.asarray(counts)
        if self.states:
            taken = self._tensor(self.plan.rows)
            for layer in self.states:
                layer.keep(taken)

    def copy(self, source: int, target: int) -> None:
        """Overwrite a row with another."""
        width = int(self.lengths[source])
        for layer in self.ragged:
            layer.copy(source, target, width)
        for state in self.states:
            state.copy_state(source, target)
        self.lengths[target] = width
