"""A weight that is both the table of embeddings and the output head, and one gradient for both.

The gradient of an embedding is a table of the vocabulary's size in which only the rows that were
read differ from zero. Autograd fills such a table with zeros, and writes a third one for the sum
with the gradient of the head. Here the rows are added to the gradient of the head, where it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from rlhf.models.architecture import trunk_of, unwrap_peft
from rlhf.models.output_head import has_plain_head

# Whether a model reads embeddings that it is handed as it reads tokens.
_takes_embeddings: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _TiedViews(torch.autograd.Function):
    """Two views of one weight: for looking rows up, and for the output head."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, rows: Tensor | None, head: Tensor | None) -> Tensor | None:  # type: ignore[override]
        if rows is None:
            return head
        # Often read tokens sum up many rows: in float32, as all long sums.
        precise = torch.promote_types(rows.dtype, torch.float32)
        summed = rows.to(precise).coalesce().to(rows.dtype)
        return summed.to_dense() if head is None else head.contiguous().add_(summed)


@dataclass(frozen=True)
class TiedEmbedding:
    """What one pass uses instead of the model's own tied weight; the gradient reaches that."""

    table: Tensor  # [V, D] for looking up
    head: Tensor  # [V, D] for the output head
    padding_idx: int | None

    def embed(self, tokens: Tensor) -> Tensor:
        """[..., D] embeddings of tokens [...]."""
        return embedding(tokens, self.table, self.padding_idx, sparse=True)


def tied_embedding(model: Any) -> TiedEmbedding | None:
    """A fresh table for one pass with gradients.

    Args:
        model: a causal model, or a PEFT model around one.

    Returns:
        None where it would save nothing: the weights are two or frozen, no gradient is asked for,
        or they lie on an accelerator, which fills tables at no cost. None, too, for embeddings
        that do more than look up, and for models that do more with tokens than with embeddings.
    """
    rows, head = (
        unwrap_peft(model).get_input_embeddings(),
        unwrap_peft(model).get_output_embeddings(),
    )
    if type(rows) is not nn.Embedding or type(head) is not nn.Linear:
        return None
    weight = rows.weight
    if head.weight is not weight or head.bias is not None:
        return None
    if rows.max_norm is not None or rows.scale_grad_by_freq:
        return None
    if not (weight.requires_grad and torch.is_grad_enabled() and weight.device.type == "cpu"):
        return None
    if not (has_plain_head(model) and takes_embeddings(trunk_of(model))):
        return None
    return TiedEmbedding(*_TiedViews.apply(weight), rows.padding_idx)  # type: ignore[misc]


def takes_embeddings(trunk: Any) -> bool:
    """Whether a decoder makes the same of tokens and of their embeddings; tried once.

    Some families scale what they look up, but not what they are handed.
    """
    if trunk not in _takes_embeddings:
        rows = trunk.get_input_embeddings()
        ids = torch.arange(2, 6, device=rows.weight.device)[None] % rows.num_embeddings
        training = trunk.training
        trunk.eval()  # dropout would differ between the two
        try:
            with torch.no_grad():
                looked_up = trunk(input_ids=ids, use_cache=False).last_hidden_state
                handed = trunk(inputs_embeds=rows(ids), use_cache=False).last_hidden_state
            _takes_embeddings[trunk] = bool(torch.equal(looked_up, handed))
        finally:
            trunk.train(training)
    return _takes_embeddings[trunk]


def without_tied_table(trunk: Any) -> None:
    """Let a decoder look its tokens up itself from now on."""
    _takes_embeddings[trunk] = False
