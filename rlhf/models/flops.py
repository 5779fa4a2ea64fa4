"""How much of a machine's arithmetic a model uses."""

from __future__ import annotations

import time
from typing import Any

import torch

from rlhf.models.architecture import trunk_of, unwrap_peft

SIZE = 1024
TRIALS = 8


@torch.no_grad()
def peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of square matrix products: the best of a few."""
    one = torch.randn(SIZE, SIZE, device=device).to(dtype)
    best = float("inf")
    for _ in range(TRIALS):
        start = time.perf_counter()
        (one @ one)[0, 0].item()  # waits for an accelerator
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best


def update_flops(model: Any, *, tokens: int, learned: int) -> float:
    """Operations of one forward and backward pass, products of attention weights left out.

    Two for each weight and token forward and four backward; the output head sees only the tokens
    that are learned.

    Args:
        model: a causal model, or a PEFT model around one.
        tokens: computed.
        learned: of them, those whose log-probability is needed.
    """
    head = unwrap_peft(model).get_output_embeddings()  # None: the model is a reward model
    embedding = unwrap_peft(model).get_input_embeddings().weight.numel()
    trunk = sum(p.numel() for p in trunk_of(model).parameters()) - embedding
    return 6.0 * (trunk * tokens + (head.weight.numel() * learned if head else 0))
