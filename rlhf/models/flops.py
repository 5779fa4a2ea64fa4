"""FLOPs of a training step and FLOPs per second of the device, for the FLOPs utilization (MFU)."""

from __future__ import annotations

import time
from typing import Any

import torch

from rlhf.models.architecture import text_config, trunk_of, unwrap_peft

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


def forward_flops(model: Any, *, tokens: int, head_tokens: int, critic: Any = None) -> float:
    """Return the FLOPs of a forward pass, computed from the number of weights.

    Each weight takes two FLOPs per token. Of the experts of a mixture, only those count that a
    token is routed to. The weights of the input embedding are not counted, because it is a table
    lookup. The products of queries with keys and of attention weights with values are not counted
    either.

    Args:
        model: Causal model or reward model.
        tokens: Number of tokens in the forward pass of the decoder.
        head_tokens: Number of tokens to which the output head is applied, which are the tokens in
            the loss.
        critic: Decoder of a separate critic, or None.
    """
    return 2.0 * _weights_times_tokens(model, tokens, head_tokens, critic, only_trained=False)


def forward_and_backward_flops(
    model: Any, *, tokens: int, head_tokens: int, critic: Any = None
) -> float:
    """Return the FLOPs of a forward and a backward pass; see `forward_flops`.

    In the backward pass, each weight takes two FLOPs per token for the gradient of its input, and
    each trained weight two more for its own gradient.
    """
    trained = _weights_times_tokens(model, tokens, head_tokens, critic, only_trained=True)
    forward = forward_flops(model, tokens=tokens, head_tokens=head_tokens, critic=critic)
    return 2 * forward + 2.0 * trained


def _weights_times_tokens(
    model: Any, tokens: int, head_tokens: int, critic: Any, *, only_trained: bool
) -> float:
    """Return the sum over all weights of the number of tokens that they are multiplied with.

    With ``only_trained``, the sum is over the weights that require gradients.
    """
    inner = unwrap_peft(model)
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings().weight
    fraction = _used_fraction_of_experts(text_config(inner))
    decoders = [(trunk_of(model), embedding.requires_grad)]
    if critic is not None:
        decoders.append((critic, True))
    total = 0.0
    for decoder, embedding_is_trained in decoders:
        for name, weight in decoder.named_parameters():
            if weight.requires_grad or not only_trained:
                is_expert = "experts" in name.split(".")
                total += tokens * weight.numel() * (fraction if is_expert else 1.0)
        if embedding_is_trained or not only_trained:
            total -= tokens * embedding.numel()
    if head is not None and (head.weight.requires_grad or not only_trained):  # None: reward model
        total += head_tokens * head.weight.numel()
    return total


def _used_fraction_of_experts(config: Any) -> float:
    """Return the fraction of the experts of a layer that a token is routed to; 1 if unknown."""
    totals = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((getattr(config, name) for name in totals if getattr(config, name, None)), None)
    used = getattr(config, "num_experts_per_tok", None)
    return used / total if used and total else 1.0
