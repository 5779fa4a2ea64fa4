"""Compute log-probabilities and entropies of selected tokens without storing [B, T, V] logits.

The output head is applied only at positions whose next token is selected: a sampled token or, in
offline training, a completion token. The logits of large batches are computed in chunks, and
computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rlhf.models.architecture import unwrap_peft
from rlhf.models.fast.row_chunks import row_chunks
from rlhf.models.output_head import logits_of

# Maximum number of logits per call of the output head; in bf16, they take 256 MiB.
HEAD_CHUNK_LOGITS = 128 * 2**20
# Maximum number of logits per chunk of the softmax, so that a chunk stays in a core's cache.
SOFTMAX_CHUNK_LOGITS = 2**19


def target_logprobs_and_entropies(
    model: Any,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    head_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each target, and the entropy of its distribution.

    Args:
        model: Causal model, of which only the output head is used.
        hidden: Hidden state before each target, [N, D].
        targets: Token ids [N].
        temperature: Divides the logits.
        with_entropy: Whether to compute entropies. If False, the entropies are 0, and the
            computation is faster.
        head_weight: Weight [V, D] of the output head. By default, the model's weight is used.

    Returns:
        Log-probabilities [N] and entropies [N] in nats, with gradients. They are float32, or
        float64 for float64 models.
    """

    def logprobs_of_chunk(
        rows: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_of(model, rows, head_weight=head_weight)
        outputs = ChunkedLogProb.apply(logits, ids, 1.0 / temperature, with_entropy)
        return outputs  # type: ignore[return-value]

    vocabulary = unwrap_peft(model).config.get_text_config().vocab_size
    size = max(1, HEAD_CHUNK_LOGITS // vocabulary)
    if len(targets) <= size:
        return logprobs_of_chunk(hidden, targets)
    chunks = [
        checkpoint(logprobs_of_chunk, rows, ids, use_reentrant=False)
        for rows, ids in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([c[0] for c in chunks]), torch.cat([c[1] for c in chunks])


class ChunkedLogProb(torch.autograd.Function):
    """Compute the log-softmax of logits [N, V] at one target per row, and the entropy of each row.

    The logits are first multiplied by ``scale``. Without ``with_entropy``, the entropies are 0.

    Rows are computed in chunks that stay in the cache, so the logits are read from memory once.
    Only one tensor of size [N, V], the logits in their own dtype, is stored for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, scale: float, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        selected, totals, entropy = (
            torch.zeros(len(logits), dtype=wide, device=logits.device) for _ in range(3)
        )
        for rows in row_chunks(logits, SOFTMAX_CHUNK_LOGITS):
            block = logits[rows].to(wide, copy=True).mul_(scale)
            at = block.gather(1, targets[rows, None])[:, 0]
            top = block.amax(1)
            block.sub_(top[:, None])
            weights = block.exp() if with_entropy else block.exp_()
            total = weights.sum(1)
            if with_entropy:  # log Z - E[logit]
                expected = torch.linalg.vecdot(weights, block) / total
                entropy[rows] = total.log() - expected
            totals[rows] = total.log() + top
            selected[rows] = at - totals[rows]
        ctx.save_for_backward(logits, targets, totals, entropy)
        ctx.scale, ctx.with_entropy = scale, with_entropy
        return selected, entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor, grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        logits, targets, totals, entropy = ctx.saved_tensors
        out = torch.empty_like(logits)
        spread = ctx.with_entropy and bool(grad_entropy.any())
        for rows in row_chunks(logits, SOFTMAX_CHUNK_LOGITS):
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
