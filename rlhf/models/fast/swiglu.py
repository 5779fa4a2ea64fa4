"""A fused SwiGLU product silu(g) * u, which reads its inputs from memory once.

As a chain of tensor operations, the product saves three tensors for the backward pass, each as wide
as the feed-forward layer. The function in this module saves only g and u, and recomputes silu(g) in
the backward pass. On a CPU, it computes the product for a few rows at a time, which stay in a
core's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from rlhf.models.fast.patching import gives_same_outputs, replace_forward
from rlhf.models.fast.row_chunks import row_chunks

# Maximum number of elements per chunk, so that a chunk stays in a core's cache.
CHUNK_ELEMENTS = 2**17


class SwiGLUFunction(torch.autograd.Function):
    """Compute silu(g) * u (Shazeer 2020, arXiv:2002.05202) for two tensors of the same shape."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        g, u = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        out = torch.empty_like(g)
        for rows in row_chunks(g, CHUNK_ELEMENTS):
            torch.mul(silu(g[rows]), u[rows], out=out[rows])
        return out.view(gate.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        g, u, upstream = (x.reshape(-1, x.shape[-1]) for x in (gate, up, grad))
        grad_gate, grad_up = torch.empty_like(g), torch.empty_like(u)
        for rows in row_chunks(g, CHUNK_ELEMENTS):
            torch.mul(silu(g[rows]), upstream[rows], out=grad_up[rows])
            inner = upstream[rows] * u[rows]
            grad_gate[rows] = torch.ops.aten.silu_backward(inner, g[rows])
        return grad_gate.view(gate.shape), grad_up.view(up.shape)


def _swiglu_forward(self: Any, hidden_states: Tensor) -> Tensor:
    gated = SwiGLUFunction.apply(self.gate_proj(hidden_states), self.up_proj(hidden_states))
    return self.down_proj(gated)


@torch.no_grad()
def patch_swiglu(model: nn.Module) -> int:
    """Replace the forward method of a model's SwiGLU layers; return the number of replacements."""
    return replace_forward(
        model,
        _swiglu_forward,
        is_supported=_has_swiglu_layers,
        has_same_outputs=_swiglu_gives_same_outputs,
    )


def _has_swiglu_layers(module: Any) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return all(isinstance(getattr(module, name, None), nn.Module) for name in parts)


def _swiglu_gives_same_outputs(module: Any) -> bool:
    weight = next(module.parameters())
    points = torch.linspace(-4, 4, 9).to(weight)
    if (module.act_fn(points) - silu(points)).abs().max() > 1e-2:  # another activation: GELU
        return False
    return gives_same_outputs(
        module, _swiglu_forward, width=module.gate_proj.in_features, dtype_as=weight
    )
