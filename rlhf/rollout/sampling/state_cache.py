"""Recurrent states of many rows: what a linear-attention or state-space layer keeps of its tokens.

A state has no positions: it cannot be padded, nor can tokens be taken back. Rows that pass through
the model together therefore take equally many tokens, and only those that take them are written.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer


class StateLayer(LinearAttentionLayer):
    """One layer's states, [rows, ...] each; the model sees those of the rows of one pass.

    Args:
        rows: episodes held at once.
        number_of_states: pairs of convolution and recurrent state.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, rows: int, number_of_states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.rows = rows
        self.stored: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, slots: torch.Tensor, *, fresh: bool) -> None:
        """Show the model the states of these rows [n], or none where they have read nothing."""
        for index in range(self.number_of_states):
            conv, recurrent = self.stored.get(("conv", index)), self.stored.get(("state", index))
            shown = [
                None if fresh or store is None else store[slots] for store in (conv, recurrent)
            ]
            self.conv_states[index], self.recurrent_states[index] = shown
            self.is_conv_states_initialized[index] = shown[0] is not None
            self.is_recurrent_states_initialized[index] = shown[1] is not None
            self.has_previous_state[index] = not fresh

    def keep(self, slots: torch.Tensor) -> None:
        """Store the states that the model left, as those of these rows [n]."""
        shown: dict[tuple[str, int], Any] = {}
        for index in range(self.number_of_states):
            shown["conv", index] = self.conv_states[index]
            shown["state", index] = self.recurrent_states[index]
        for key, states in shown.items():
            if states is not None:
                if key not in self.stored:
                    self.stored[key] = states.new_zeros((self.rows, *states.shape[1:]))
                self.stored[key][slots] = states

    def copy_state(self, source: int, target: int) -> None:
        """Overwrite a row with another's."""
        for store in self.stored.values():
            store[target] = store[source]
