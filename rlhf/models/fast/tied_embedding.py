"""A tied embedding whose sparse gradient is added to the gradient of the output head in place.

The gradient of an embedding has one row per token of the vocabulary, but only the rows of tokens in
the batch are nonzero. Autograd allocates a dense gradient for the embedding, and another tensor for
its sum with the gradient of the head. With the views in this module, only the nonzero rows are
added, in place, to the gradient of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from rlhf.models.architecture import trunk_of, unwrap_peft
from rlhf.models.comparison import evaluation_mode
from rlhf.models.output_head import head_is_weight_product

# Decoder -> result of ``gives_equal_states_from_embeddings``.
_equal_states_from_embeddings: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _TiedViews(torch.autograd.Function):
    """Return two views of one weight: one for the embedding lookup and one for the output head."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, rows: Tensor | None, head: Tensor | None) -> Tensor | None:  # type: ignore[override]
        if rows is None:
            return head
        # The gradient of a frequent token is a sum of many rows, which needs float32.
        wide = torch.promote_types(rows.dtype, torch.float32)
        summed = rows.to(wide).coalesce().to(rows.dtype)
        return summed.to_dense() if head is None else head.contiguous().add_(summed)


@dataclass(frozen=True)
class TiedEmbedding:
    """Two views of a tied weight for one forward and backward pass.

    The gradients of the views are added to the gradient of the weight.
    """

    table: Tensor  # [V, D] view for the embedding lookup
    head: Tensor  # [V, D] view for the output head
    padding_idx: int | None

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [..., D] of tokens [...]."""
        return embedding(tokens, self.table, self.padding_idx, sparse=True)


def make_tied_embedding(model: Any) -> TiedEmbedding | None:
    """Make the views of a tied embedding for one forward pass with gradients.

    Returns:
        The views, or None in two cases. The model does not support them, because its embedding or
        its head has additional operations, or because its decoder treats tokens differently from
        embeddings. Or they save nothing, because the weights are not tied, need no gradient, or are
        on an accelerator.
    """
    inner = unwrap_peft(model)
    rows, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if type(rows) is not nn.Embedding or type(head) is not nn.Linear:
        return None
    weight = rows.weight
    if head.weight is not weight or head.bias is not None:
        return None
    if rows.max_norm is not None or rows.scale_grad_by_freq:
        return None
    if not (weight.requires_grad and torch.is_grad_enabled() and weight.device.type == "cpu"):
        return None
    if not (head_is_weight_product(model) and gives_equal_states_from_embeddings(trunk_of(model))):
        return None
    return TiedEmbedding(*_TiedViews.apply(weight), rows.padding_idx)  # type: ignore[misc]


def gives_equal_states_from_embeddings(trunk: Any) -> bool:
    """Return whether a decoder computes equal states from tokens and from their embeddings.

    Some families scale the embeddings that they look up, but not embeddings that are passed as
    arguments. The result is cached.
    """
    if trunk not in _equal_states_from_embeddings:
        rows = trunk.get_input_embeddings()
        ids = torch.arange(2, 6, device=rows.weight.device)[None] % rows.num_embeddings
        with torch.no_grad(), evaluation_mode(trunk):  # with dropout, the states would differ
            from_tokens = trunk(input_ids=ids, use_cache=False).last_hidden_state
            from_embeddings = trunk(inputs_embeds=rows(ids), use_cache=False).last_hidden_state
        _equal_states_from_embeddings[trunk] = bool(torch.equal(from_tokens, from_embeddings))
    return _equal_states_from_embeddings[trunk]


def copy_embedding_check_result(source: Any, target: Any) -> None:
    """Use the result of ``gives_equal_states_from_embeddings`` for one decoder also for another.

    Args:
        source: Decoder.
        target: Copy of the decoder, or a decoder of the same architecture.
    """
    _equal_states_from_embeddings[target] = gives_equal_states_from_embeddings(source)


def disable_tied_embedding(trunk: Any) -> None:
    """Make ``make_tied_embedding`` return None for this decoder's model from now on."""
    _equal_states_from_embeddings[trunk] = False
