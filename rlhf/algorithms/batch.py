"""`TrainingBatch`, the tensors that advantage estimators, losses and training steps use."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainingBatch:
    """B token sequences (rows), padded on the right to [B, T], with all tensors of an update.

    Index t of a [B, T] field describes token t. A field is None as long as it has not been
    computed, and can be None if the algorithm does not need it. Entries outside the masks may have
    any value, nan included.
    """

    tokens: Tensor
    """[B, T] token ids."""
    attention_mask: Tensor
    """[B, T], True for tokens that are not padding."""
    action_mask: Tensor
    """[B, T], True for the tokens that are trained on. In rollouts these are the sampled tokens,
    including stop tokens. In offline data they are the tokens of the completion."""

    sampler_logprobs: Tensor | None = None
    """[B, T], log-probabilities that the sampler computed during sampling."""
    old_logprobs: Tensor | None = None
    """[B, T], log-probabilities under the policy at the start of the update, computed by the
    trainer. Without stale rollouts, this policy sampled the rollouts."""
    ref_logprobs: Tensor | None = None
    """[B, T], log-probabilities under the reference policy."""
    values: Tensor | None = None
    """[B, T], the values of the critic at the start of the update."""
    entropy: Tensor | None = None
    """[B, T], entropy in nats of the policy at the start of the update at each sampled token; 0 in
    rows without computed entropies."""

    rewards: Tensor | None = None
    """[B, T], training rewards before KL and cost penalties. An episode that could not be scored
    has a nan reward."""
    costs: Tensor | None = None
    """[B, T], costs of a constrained task."""
    turns: Tensor | None = None
    """[B, T] integers, index of the turn of each token, starting at 0."""
    groups: Tensor | None = None
    """[B] integers, equal for rollouts with the same start state."""
    truncated: Tensor | None = None
    """[B], True if the episode was truncated, which means that a limit ended it before the task
    was finished."""
    bootstrap: Tensor | None = None
    """[B], the critic's value of the last state of a truncated episode; 0 for other episodes."""

    advantages: Tensor | None = None
    """[B, T], 0 outside `loss_mask`."""
    returns: Tensor | None = None
    """[B, T], regression targets of the critic; 0 if the algorithm has no critic."""
    loss_mask: Tensor | None = None
    """[B, T], True for the action tokens that the losses include."""

    pair_ids: Tensor | None = None
    """[B] integers. Rows with equal ids must share a micro-batch, because a loss compares them."""
    chosen: Tensor | None = None
    """[B], True for the preferred row of a pair and for a row that belongs to no pair."""
    margins: Tensor | None = None
    """[B], the margin that the loss subtracts from the difference between the rewards of the two
    rows of a pair."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    def require(self, name: str) -> Tensor:
        """Return the field `name`, which must not be None.

        Raises:
            ValueError: The field is None.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this algorithm needs {name}")
        return value

    def scores(self) -> Tensor:
        """Return the undiscounted return of each episode, [B]; nan for an unscored episode."""
        rewards = self.require("rewards")
        return torch.where(self.action_mask, rewards, 0.0).sum(dim=1)

    def select(self, rows: Tensor) -> TrainingBatch:
        """Return a batch of the selected rows, without the columns that are padding in all of them.

        Args:
            rows: [N] row indices.
        """
        width = int(self.attention_mask[rows].sum(1).max())
        selected = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value = value[rows]
                selected[field.name] = value[:, :width] if value.dim() == 2 else value
        return replace(self, **selected)


def dense_index(ids: Tensor) -> Tensor:
    """Return the index of each id in the sorted list of distinct ids, [B]."""
    return torch.unique(ids, return_inverse=True)[1]  # pyright: ignore
