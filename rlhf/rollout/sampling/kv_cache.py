"""A key-value cache for rows of different lengths, which are kept over several turns.

Row ``i`` contains the keys and values of one episode at positions ``0 .. lengths[i]-1``, without
padding. A forward pass processes the new tokens of several rows in one batch, and appends their
keys and values to the rows. Layers with a sliding window store all tokens and mask those before the
window. Layers with a recurrent state store one state per row.
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
from rlhf.rollout.sampling.protocols import ForwardPass, MultiRowCache
from rlhf.rollout.sampling.state_cache import RecurrentStateLayer

# The capacity of a cache, in tokens per row, is a multiple of this number.
CAPACITY_MULTIPLE = 64


@dataclass(frozen=True)
class ForwardPlan:
    """Indices and mask of a forward pass that appends N new tokens to n rows, at most L per row."""

    reading: slice | torch.Tensor
    """Index of the n rows in the cache. It is a slice, which needs no copy, for contiguous rows."""
    shape: tuple[int, int]  # (n, L)
    unpadded: bool
    """Whether L tokens are appended to every row, so that there is no padding."""
    row: torch.Tensor  # [N] index of each token's row among the n rows
    offset: torch.Tensor  # [N] index of each token among the new tokens of its row
    slot: torch.Tensor  # [N] index of each token's row in the cache
    position: torch.Tensor  # [N] position of each token in its row
    ends: torch.Tensor  # [n] index of each row's last new token
    mask: torch.Tensor  # [n, 1, L, width], 0 if attention is allowed, else the dtype's minimum
    queries: torch.Tensor  # [n, L] position of each query, including padding
    rows: np.ndarray  # [n] indices of the rows in the cache
    _masks: dict[int, torch.Tensor] = field(default_factory=dict)

    def mask_within(self, window: int | None) -> torch.Tensor:
        """Return the mask [n, 1, L, width] for attention to the last ``window`` tokens.

        The query is one of these tokens. If ``window`` is None, there is no window.
        """
        width = self.mask.shape[-1]
        if window is None or width <= window:
            return self.mask
        if window not in self._masks:
            columns = torch.arange(width, device=self.mask.device)
            outside = columns <= self.queries[:, None, :, None] - window
            self._masks[window] = self.mask.masked_fill(outside, torch.finfo(self.mask.dtype).min)
        return self._masks[window]

    def pad(self, flat: torch.Tensor) -> torch.Tensor:
        """Convert values [N, ...] of tokens to [n, L, ...], padded with zeros."""
        if self.unpadded:
            return flat.view(*self.shape, *flat.shape[1:])
        padded = flat.new_zeros((*self.shape, *flat.shape[1:]))
        padded[self.row, self.offset] = flat
        return padded

    def flatten(self, padded: torch.Tensor) -> torch.Tensor:
        """Convert [n, L, ...] to values [N, ...] of tokens, without the padding."""
        return padded.flatten(0, 1) if self.unpadded else padded[self.row, self.offset]


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, capacity, heads, dim]."""

    keys: Any
    values: Any
    is_compileable = False
    is_sliding = False

    def __init__(self, cache: RaggedCache) -> None:
        super().__init__()
        # A reference cycle would keep gigabytes until the garbage collector runs.
        self.cache = weakref.proxy(cache)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the tensors with the shape of the first keys [N, heads, dim]."""
        shape = (self.cache.rows, self.cache.capacity)
        # torch.empty could contain nan, and a nan makes the attention output nan even if its
        # position is masked.
        self.keys = key_states.new_zeros((*shape, *key_states.shape[1:]))
        self.values = value_states.new_zeros((*shape, *value_states.shape[1:]))
        self.is_initialized = True

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values [N, heads, dim] of the new tokens of the current plan.

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
        """Append padded keys and values [n, heads, L, dim]. Transformers calls this method."""
        plan = self.cache.plan
        return self.append(
            plan.flatten(key_states.transpose(1, 2)), plan.flatten(value_states.transpose(1, 2))
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns in use and the position of the first column.

        Transformers calls this method to build a mask, but the mask of the plan is used instead.
        """
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        """Return the number of columns that the current plan uses."""
        return self.cache.plan.mask.shape[-1] if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Return the number of allocated columns."""
        return self.cache.capacity

    get_max_cache_shape = get_max_length  # the name in older versions of transformers

    def grow(self) -> None:
        """Reallocate the tensors for the cache's capacity, and keep their content."""
        if self.is_initialized:
            old = self.keys, self.values
            self.lazy_initialization(self.keys[0, :1], self.values[0, :1])
            for store, previous in zip((self.keys, self.values), old, strict=True):
                store[:, : previous.shape[1]] = previous

    def copy_row(self, source: int, target: int, width: int) -> None:
        """Copy the first ``width`` tokens of row ``source`` to row ``target``."""
        for store in (self.keys, self.values):
            store[target, :width] = store[source, :width]


class RaggedStateLayer(RecurrentStateLayer, RaggedLayer):
    """A layer with attention and a recurrent state."""

    def __init__(self, cache: RaggedCache, number_of_states: int) -> None:
        RaggedLayer.__init__(self, cache)
        RecurrentStateLayer.__init__(self, cache.rows, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Initialize keys and values (positional arguments) or states (keyword arguments)."""
        kind: Any = RaggedLayer if args else RecurrentStateLayer
        kind.lazy_initialization(self, *args, **kwargs)


class RaggedCache(MultiRowCache, Cache):
    """Keys and values, or recurrent states, of ``rows`` episodes.

    Args:
        layers: Number of layers, if all have attention only; otherwise the kind of each layer and
            the number of its states (see ``cache_kinds_and_state_counts``).
        rows: Number of episodes in the cache.
        dtype: Dtype of the model and the masks.
        device: Device of the model.
        stepwise: Whether new tokens of rows with a state are processed one by one. This is needed
            if the model discards the state when it processes several tokens at once.
        limit: Row length in tokens beyond which rotary frequencies change. Longer rows need a
            separate forward pass. By default, the frequencies do not change.
    """

    plan: ForwardPlan

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
        MultiRowCache.__init__(self, rows)
        kinds = [(ATTENTION, 0)] * layers if isinstance(layers, int) else layers
        all_layers = [self._make_layer(*each) for each in kinds]
        self.ragged = [layer for layer in all_layers if isinstance(layer, RaggedLayer)]
        self.states = [layer for layer in all_layers if isinstance(layer, RecurrentStateLayer)]
        self.in_place = not self.states and limit is None
        Cache.__init__(self, layers=all_layers)

    def _make_layer(self, kind: str, number_of_states: int) -> Any:
        if kind == ATTENTION:
            return RaggedLayer(self)
        if kind == BOTH:
            return RaggedStateLayer(self, number_of_states)
        return DummyLayer() if kind == NOTHING else RecurrentStateLayer(self.rows, number_of_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns that the current plan uses."""
        if self.ragged:
            return self.ragged[0].get_seq_length()
        return self.plan.mask.shape[-1] if self.lengths.any() else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of columns of the current plan, and the first column's position."""
        return self.plan.mask.shape[-1], 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return 0, because the model receives the positions of the queries.

        They cannot be derived from one offset, because rows have different lengths.
        """
        return 0

    def passes_of_compatible_rows(
        self, rows: np.ndarray, inputs: Sequence[Sequence[int]]
    ) -> list[ForwardPass]:
        """Split new tokens of rows into forward passes, in order.

        Usually one forward pass is enough. Separate passes are needed in three cases. Recurrent
        states cannot be padded, so rows with states are grouped by the number of new tokens and by
        whether they already have a state. With ``stepwise``, each new token of a row with a state
        has its own pass. Rows longer than ``limit`` form separate groups.
        """
        if self.in_place:
            return super().passes_of_compatible_rows(rows, inputs)
        groups: dict[tuple[int, ...], list[tuple[int, Sequence[int]]]] = {}
        for index, (length, ids) in enumerate(
            zip(self.lengths[rows].tolist(), inputs, strict=True)
        ):
            one_by_one = self.stepwise and length
            for step, part in enumerate([[token] for token in ids] if one_by_one else [ids]):
                total = length + step + len(part)
                long = self.limit is not None and total > self.limit
                kind = (not length, len(part)) if self.states else (False, 0)
                groups.setdefault((step, *kind, long), []).append((index, part))
        return [
            ForwardPass(np.array([index for index, _ in group]), [ids for _, ids in group])
            for _, group in sorted(groups.items())
        ]

    def ensure_capacity(self, tokens_per_row: int) -> None:
        """Grow the capacity to at least ``tokens_per_row`` tokens per row.

        If the capacity must grow, it is at least doubled.
        """
        if tokens_per_row > self.capacity:
            # The capacity is rounded up, so that the next cache can reuse the memory.
            self.capacity = max(
                -(-tokens_per_row // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE, 2 * self.capacity
            )
            for layer in self.ragged:
                layer.grow()

    def plan_forward_pass(self, rows: ArrayLike, counts: ArrayLike) -> ForwardPlan:
        """Plan a forward pass that appends ``counts[i]`` tokens to row ``rows[i]``.

        After the forward pass, call ``advance`` with the same arguments. If ``in_place`` is True,
        the arguments can be limited to the rows whose new tokens are kept.
        """
        slots, number = np.asarray(rows), np.asarray(counts)
        n, longest = len(slots), int(number.max())
        row = np.repeat(np.arange(n), number)
        ends = number.cumsum()
        offset = np.arange(ends[-1]) - np.repeat(ends - number, number)
        starts = self.lengths[slots]
        contiguous = int(slots[-1] - slots[0]) == n - 1 and bool((np.diff(slots) == 1).all())
        padded = self._to_device(starts)[:, None] + torch.arange(longest, device=self.device)
        columns = torch.arange(int((starts + number).max()), device=self.device)
        hidden = columns > padded[:, None, :, None]
        allowed = torch.zeros((), dtype=self.dtype, device=self.device)
        self.plan = ForwardPlan(
            reading=slice(slots[0], slots[0] + n) if contiguous else self._to_device(slots),
            shape=(n, longest),
            unpadded=len(row) == n * longest,
            row=self._to_device(row),
            offset=self._to_device(offset),
            slot=self._to_device(slots[row]),
            position=self._to_device(starts[row] + offset),
            ends=self._to_device(ends - 1),
            mask=torch.where(hidden, torch.finfo(self.dtype).min, allowed),
            queries=padded,
            rows=slots,
        )
        if self.states:
            assert self.plan.unpadded, "a state cannot be padded"
            assert starts.all() or not starts.any(), "rows with and without a state"
            slots_read = self._to_device(slots)
            for layer in self.states:
                layer.load_states(slots_read, fresh=not starts.any())
        return self.plan

    def _to_device(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self.device)

    def advance(self, rows: ArrayLike, counts: ArrayLike) -> None:
        """Increase the lengths of the rows after a forward pass, and store their states."""
        super().advance(rows, counts)
        if self.states:
            slots = self._to_device(self.plan.rows)
            for layer in self.states:
                layer.store_states(slots)

    def copy_row(self, source: int, target: int) -> None:
        """Copy row ``source`` to row ``target``."""
        super().copy_row(source, target)
        width = int(self.lengths[source])
        for layer in self.ragged:
            layer.copy_row(source, target, width)
        for state in self.states:
            state.copy_states(source, target)
