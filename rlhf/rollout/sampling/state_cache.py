"""Recurrent states (linear attention, state-space layers) of many rows.

Padding would change a state, and tokens cannot be removed from it. All rows of a forward pass
therefore have the same number of new tokens, and only the states of these rows are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer


class RecurrentStateLayer(LinearAttentionLayer):
    """States [rows, ...] of one layer. A forward pass reads the states of its rows.

    Args:
        rows: Number of episodes in the cache.
        number_of_states: Number of pairs of a convolution state and a recurrent state.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, rows: int, number_of_states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.rows = rows
        self.stored: dict[tuple[str, int], torch.Tensor] = {}

    def load_states(self, slots: torch.Tensor, *, fresh: bool) -> None:
        """Set the states that the model reads to those of the rows ``slots`` [n].

        If ``fresh`` is True, the rows are new and have no states.
        """
        for index in range(self.number_of_states):
            conv, recurrent = self.stored.get(("conv", index)), self.stored.get(("state", index))
            pair = [None if fresh or store is None else store[slots] for store in (conv, recurrent)]
            self.conv_states[index], self.recurrent_states[index] = pair
            self.is_conv_states_initialized[index] = pair[0] is not None
            self.is_recurrent_states_initialized[index] = pair[1] is not None
            self.has_previous_state[index] = not fresh

    def store_states(self, slots: torch.Tensor) -> None:
        """Store the model's current states as those of the rows ``slots`` [n]."""
        present: dict[tuple[str, int], Any] = {}
        for index in range(self.number_of_states):
            present["conv", index] = self.conv_states[index]
            present["state", index] = self.recurrent_states[index]
        for key, states in present.items():
            if states is not None:
                if key not in self.stored:
                    self.stored[key] = states.new_zeros((self.rows, *states.shape[1:]))
                self.stored[key][slots] = states

    def copy_states(self, source: int, target: int) -> None:
        """Copy the states of row ``source`` to row ``target``."""
        for store in self.stored.values():
            store[target] = store[source]
