"""`TrainingBatch`, the data that advantage estimators, losses and training steps share."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainingBatch:
    """Rows of tokens, padded on the right to [B, T], with all tensors that an update reads.

    Index t of a [B, T] field describes token t. A field is None if the algorithm does not need it
    or if it is not computed yet. Entries outside the masks may have any value, nan included.
    """

    tokens: Tensor
    """[B, T] token ids."""
    attention_mask: Tensor
    """[B, T], True for tokens that are not padding."""
    action_mask: Tensor
    """[B, T], True for tokens of the policy. These are the sampled tokens, including stop tokens,
    or the completion of a data row."""

    sampler_logprobs: Tensor | None = None
    """[B, T], log-probabilities computed by the sampler when it drew the tokens."""
    old_logprobs: Tensor | None = None
    """[B, T], log-probabilities under the sampling policy, computed by the trainer."""
    ref_logprobs: Tensor | None = None
    """[B, T], log-probabilities under the reference policy."""
    values: Tensor | None = None
    """[B, T], the critic's values when the rollouts were collected."""
    entropy: Tensor | None = None
    """[B, T], entropy in nats of the distributions from which the tokens were drawn; 0 in rows for
    which it was not computed."""

    rewards: Tensor | None = None
    """[B, T], training rewards before KL and cost penalties. An episode that could not be scored
    has a nan reward."""
    costs: Tensor | None = None
    """[B, T], costs of a constrained task."""
    turns: Tensor | None = None
    """[B, T] integers, turn of each token, counted from 0."""
    groups: Tensor | None = None
    """[B] integers, equal for rollouts from one start state."""
    truncated: Tensor | None = None
    """[B], True if a limit ended the episode before the task ended."""
    bootstrap: Tensor | None = None
    """[B], the critic's value of the last state of truncated episodes, 0 for others."""

    advantages: Tensor | None = None
    """[B, T], 0 outside `loss_mask`."""
    returns: Tensor | None = None
    """[B, T], the critic's targets; zeros without a critic."""
    loss_mask: Tensor | None = None
    """[B, T], True for action tokens that are included in the losses."""

    pair_ids: Tensor | None = None
    """[B] integers. Rows with equal ids must share a micro-batch, because a loss compares them."""
    chosen: Tensor | None = None
    """[B], True for the preferred row of a pair and for a row without a pair."""
    margins: Tensor | None = None
    """[B], the required difference of rewards between the two rows of a pair."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    def require(self, name: str) -> Tensor:
        """Return the field `name`, which must not be None.

        Raises:
            ValueError: the field is None; the message names it.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this algorithm needs {name}")
        return value

    def scores(self) -> Tensor:
        """Return the undiscounted return of each episode, [B]; nan if it was not scored."""
        rewards = self.require("rewards")
        return torch.where(self.action_mask, rewards, 0.0).sum(dim=1)

    def select(self, rows: Tensor) -> TrainingBatch:
        """Return a batch of the given rows, without the columns in which they have only padding.

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
    """Return the position of each id among the sorted distinct ids, [B]."""
    return torch.unique(ids, return_inverse=True)[1]  # pyright: ignore
