"""FLOPs of a training step and FLOPs per second of the device, for the FLOPs utilization (MFU)."""

from __future__ import annotations

import time
from typing import Any

import torch

from rlhf.models.architecture import trunk_of, unwrap_peft

MATRIX_SIZE = 1024
NUM_TRIALS = 8


@torch.no_grad()
def measure_peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the FLOPs per second of square matmuls; return the highest of several trials."""
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device).to(dtype)
    best = float("inf")
    for _ in range(NUM_TRIALS):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # synchronizes with an accelerator
        best = min(best, time.perf_counter() - start)
    return 2 * MATRIX_SIZE**3 / best


def forward_and_backward_flops(model: Any, *, tokens: int, head_tokens: int) -> float:
    """Return the FLOPs of a forward and a backward pass, computed from the number of weights.

    Each weight takes two FLOPs per token in the forward pass and four in the backward pass. The
    weights of the input embedding are not counted, because it is a table lookup. The products of
    queries with keys and of attention weights with values are not counted either. Frozen weights
    and the weights of all experts are counted like other weights, so the result is too large for
    LoRA and for mixtures of experts.

    Args:
        model: Causal model or reward model.
        tokens: Number of tokens in the forward pass of the decoder.
        head_tokens: Number of tokens to which the output head is applied, which are the tokens in
            the loss.
    """
    head = unwrap_peft(model).get_output_embeddings()  # None for a reward model
    embedding = unwrap_peft(model).get_input_embeddings().weight.numel()
    trunk = sum(p.numel() for p in trunk_of(model).parameters()) - embedding
    return 6.0 * (trunk * tokens + (head.weight.numel() * head_tokens if head else 0))
