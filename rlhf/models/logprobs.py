"""Log-probabilities and entropy of chosen tokens, without the logits of all the others.

Only positions whose next token was sampled reach the output head, so the [B, T, V] tensor of logits
is never made; large batches go through the head in chunks that are recomputed in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rlhf.models.architecture import text_config, usable_context
from rlhf.models.fast.row_chunks import row_chunks
from rlhf.models.own_head import is_product, own_logits

# Logits that are computed at once: 128M in bf16 are 256 MB.
CHUNK_LOGITS = 128 * 2**20
# Logits that one pass goes over.
CACHED_LOGITS = 2**19


def bare(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, adapters in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_of(model: Any) -> Any:
    """The decoder without its output head."""
    inner = bare(model)
    return inner.model if inner.base_model is inner else inner.base_model


def context_of(model: Any) -> int:
    """Longest sequence the model can read and continue, in tokens."""
    return usable_context(text_config(bare(model)))


def logits_of(
    model: Any, hidden: torch.Tensor, *, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """The output head, with all that a family puts before or after it.

    Args:
        model: a causal model.
        hidden: last hidden states [..., D].
        weight: [V, D] in place of the head's own, where ``has_plain_head``.

    Returns:
        Logits [..., V] in the model's dtype.
    """
    if weight is None and not has_plain_head(model):
        return own_logits(bare(model), trunk_of(model), hidden)
    return _product(model, hidden, weight)


def has_plain_head(model: Any) -> bool:
    """Whether a model's logits are the product of its states and the output weight, scaled."""
    return is_product(bare(model), trunk_of(model), lambda hidden: _product(model, hidden, None))


def state_width(model: Any) -> int:
    """Size of a decoder's last hidden states; some families project them below their width."""
    head = bare(model).get_output_embeddings()
    if isinstance(head, torch.nn.Linear) and has_plain_head(model):
        return head.in_features
    return bare(model).config.get_text_config().hidden_size


def _product(model: Any, hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """States times output weight, with the scalings that some families name."""
    config = bare(model).config.get_text_config()
    head = bare(model).get_output_embeddings()
    dtype = (head.weight if weight is None else weight).dtype
    if dtype.is_floating_point and hidden.dtype != dtype:  # Mamba ends in float32
        hidden = hidden.to(dtype)
    logits = head(hidden) if weight is None else torch.nn.functional.linear(hidden, weight)
    if scale := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        logits = logits * scale
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


def selected_logprobs(
    model: Any,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and the entropy of its distribution.

    Args:
        model: a causal model; only its output head is used.
        hidden: [N, D], the state before each target.
        targets: [N] token ids.
        temperature: of the policy; logits are divided by it.
        with_entropy: False saves a pass over the vocabulary and gives zeros.
        weight: [V, D] of the output head; None: its own.

    Returns:
        (log-probabilities [N], entropies [N] in nats), float32 (float64 for float64 models).
        Entropies carry gradient too.
    """

    def part(rows: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_of(model, rows, weight=weight)
        found = ChunkedLogProb.apply(logits, ids, 1.0 / temperature, with_entropy)
        return found  # type: ignore[return-value]

    vocabulary = bare(model).config.get_text_config().vocab_size
    size = max(1, CHUNK_LOGITS // vocabulary)
    if len(targets) <= size:
        return part(hidden, targets)
    parts = [
        checkpoint(part, rows, ids, use_reentrant=False)
        for rows, ids in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class ChunkedLogProb(torch.autograd.Function):
    """Log-softmax at one place, and entropy, of [N, V] logits, a few rows at a time.

    A vocabulary of 50,000 makes every pass over float32 logits a trip to memory; rows few enough
    to stay in cache make one trip of all of them, and the backward pass needs no other tensors
    than the logits, in their own dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, scale: float, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        precise = torch.promote_types(logits.dtype, torch.float32)
        chosen, totals, entropy = (
            torch.zeros(len(logits), dtype=precise, device=logits.device) for _ in range(3)
        )
        for rows in row_chunks(logits, CACHED_LOGITS):
            block = logits[rows].to(precise, copy=True).mul_(scale)
            at = block.gather(1, targets[rows, None])[:, 0]
            top = block.amax(1)
            block.sub_(top[:, None])
            weights = block.exp() if with_entropy else block.exp_()
            total = weights.sum(1)
            if with_entropy:  # log Z - E[logit]
                expected = torch.linalg.vecdot(weights, block) / total
                entropy[rows] = total.log() - expected
            totals[rows] = total.log() + top
            chosen[rows] = at - totals[rows]
        ctx.save_for_backward(logits, targets, totals, entropy)
        ctx.scale, ctx.with_entropy = scale, with_entropy
        return chosen, entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor, grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        logits, targets, totals, entropy = ctx.saved_tensors
        out = torch.empty_like(logits)
        spread = ctx.with_entropy and bool(grad_entropy.any())
        for rows in row_chunks(logits, CACHED_LOGITS):
            block = logits[rows].to(grad.dtype, copy=True).mul_(ctx.scale)
            block.sub_(totals[rows, None])  # log p
            weight = -grad[rows, None]
            if spread:  # dH/dz = -p (log p + H)
                probability = block.exp()
                block.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None]).add_(weight)
                block.mul_(probability)
            else:
                block.exp_().mul_(weight)
            block.scatter_add_(1, targets[rows, None], grad[rows, None])
            out[rows] = block.mul_(ctx.scale)
        return out, None, None, None
