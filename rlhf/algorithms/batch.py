"""The record that advantages, losses and training steps share."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainingBatch:
    """Rows of tokens, padded on the right to [B, T], with everything that an update reads.

    Index t of a [B, T] field describes token t. A field is None where the algorithm does not need
    it or where it has not been computed yet. Slots outside the masks may hold any value, nan
    included.
    """

    tokens: Tensor
    """[B, T] token ids."""
    attention_mask: Tensor
    """[B, T], True on tokens that are not padding."""
    action_mask: Tensor
    """[B, T], True on tokens whose log-probabilities count: sampled tokens with their stop tokens,
    or the completion of a data row."""

    sampler_logprobs: Tensor | None = None
    """[B, T], computed by the sampler when it drew the tokens."""
    old_logprobs: Tensor | None = None
    """[B, T], under the policy that sampled the tokens, computed by the trainer."""
    ref_logprobs: Tensor | None = None
    """[B, T], under the reference policy."""
    values: Tensor | None = None
    """[B, T], the critic's values when the rollouts were collected."""
    entropy: Tensor | None = None
    """[B, T], entropy in nats of the distributions that the tokens were drawn from."""

    rewards: Tensor | None = None
    """[B, T], rewards to train on, before KL and cost penalties. A nan marks an episode that could
    not be scored."""
    costs: Tensor | None = None
    """[B, T], costs of a constrained task."""
    turns: Tensor | None = None
    """[B, T] integers, turn of each token, counted from 0."""
    groups: Tensor | None = None
    """[B] integers, equal for rollouts from one start state."""
    truncated: Tensor | None = None
    """[B], True where a limit ended the episode before the task did."""
    bootstrap: Tensor | None = None
    """[B], the critic's value of the last state where truncated, else 0."""

    advantages: Tensor | None = None
    """[B, T], 0 outside `loss_mask`."""
    returns: Tensor | None = None
    """[B, T], the critic's targets; zeros without a critic."""
    loss_mask: Tensor | None = None
    """[B, T], action tokens that take part in the losses."""

    pair_ids: Tensor | None = None
    """[B] integers. Rows with equal ids must share a micro-batch, because a loss compares them."""
    chosen: Tensor | None = None
    """[B], True on the preferred row of a pair and on a row that is in no pair."""
    margins: Tensor | None = None
    """[B], by how much the chosen row of a pair should be rewarded more."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    def require(self, name: str) -> Tensor:
        """Return a field that must not be None.

        Raises:
            ValueError: it is None; the message names it.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this algorithm needs {name}")
        return value

    def scores(self) -> Tensor:
        """Return the undiscounted return of each episode, [B]; nan where it was not scored."""
        rewards = self.require("rewards")
        return torch.where(self.action_mask, rewards, 0.0).sum(dim=1)

    def select(self, rows: Tensor) -> TrainingBatch:
        """Return some of the rows, without the columns that then hold only padding.

        Args:
            rows: [N] indices.
        """
        width = int(self.attention_mask[rows].sum(1).max())
        selected = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value = value[rows]
                selected[field.name] = value[:, :width] if value.dim() == 2 else value
        return replace(self, **selected)


def index_of(ids: Tensor) -> Tensor:
    """Return the position of each id among the sorted distinct ids, [B]."""
    return torch.unique(ids, return_inverse=True)[1]  # pyright: ignore
