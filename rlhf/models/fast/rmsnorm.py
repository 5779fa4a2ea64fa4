"""A fused RMSNorm, whose forward and backward passes read the input from memory once.

Transformers computes RMSNorm as a chain of tensor operations, which read and write the input ten
times in float32. As a result, all norms together take as long as attention. The functions in this
module apply the whole chain to a few rows at a time, which stay in a core's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.models.fast.patching import gives_same_outputs, replace_forward
from rlhf.models.fast.row_chunks import row_chunks

# Maximum number of elements per chunk, so that a chunk stays in a core's cache.
CHUNK_ELEMENTS = 2**17


class _RMSNorm(torch.autograd.Function):
    """Compute w * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows)
        scales = torch.empty(len(rows), 1, dtype=wide, device=x.device)
        for part in row_chunks(rows, CHUNK_ELEMENTS):
            block = rows[part].to(wide)
            mean = torch.linalg.vecdot(block, block)[:, None] / block.shape[1]
            scale = torch.rsqrt(mean.add_(eps), out=scales[part])
            out[part] = (block * scale).to(x.dtype)
            out[part] *= weight
        ctx.save_for_backward(rows, weight, scales)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        rows, weight, scales = ctx.saved_tensors
        upstream = grad.reshape(rows.shape)
        out = torch.empty_like(rows)
        wide_weight = weight.to(scales.dtype)
        total = torch.zeros_like(wide_weight)
        for part in row_chunks(rows, CHUNK_ELEMENTS):
            normed = rows[part] * scales[part]
            block = upstream[part].to(scales.dtype)
            total += torch.linalg.vecdot(block, normed, dim=0)
            block = block * wide_weight
            inner = torch.linalg.vecdot(block, normed)[:, None] / block.shape[1]
            block.sub_(normed.mul_(inner))
            out[part] = block.mul_(scales[part])
        return out.view(grad.shape), total.to(weight.dtype), None


def _rmsnorm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[return-value]


@torch.no_grad()
def patch_rmsnorm(model: torch.nn.Module) -> int:
    """Replace the forward method of a model's RMSNorm modules, and return their number.

    For each class of modules, the new method is first compared with the original method on random
    inputs, because some families scale by 1 + weight.
    """
    return replace_forward(
        model,
        _rmsnorm_forward,
        is_supported=_has_rmsnorm_attributes,
        has_same_outputs=_rmsnorm_gives_same_outputs,
    )


def _has_rmsnorm_attributes(module: Any) -> bool:
    return type(module).__name__.endswith("RMSNorm") and "variance_epsilon" in vars(module)


def _rmsnorm_gives_same_outputs(module: Any) -> bool:
    weight = module.weight
    return gives_same_outputs(module, _rmsnorm_forward, width=len(weight), dtype_as=weight)
