"""Measure the speed of matrix multiplication, which is an upper bound for the speed of a model."""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks.worker import Job, StepTimer

MATRIX_SIZE = 2048
NUM_PRODUCTS = 32


def time_matmul(job: Job, timer: StepTimer) -> None:
    """Time products of square bf16 matrices; the unit of work is a floating-point operation."""
    generator = torch.Generator().manual_seed(0)
    one, other = (
        torch.randn(MATRIX_SIZE, MATRIX_SIZE, generator=generator).bfloat16() for _ in range(2)
    )
    out = torch.empty_like(one)

    def step() -> float:
        for _ in range(NUM_PRODUCTS):
            torch.matmul(one, other, out=out)
        return NUM_PRODUCTS * 2.0 * MATRIX_SIZE**3

    timer.loop(step)


def training_flops(model_folder: str, token_and_loss_counts: list[tuple[int, int]]) -> float:
    """Return the number of floating-point operations of a forward and a backward pass.

    Each weight takes two operations per token in the forward pass and four in the backward pass.
    Causal attention is included. The recomputation of activations is not included. The output head
    is counted only for tokens with a loss.

    Args:
        model_folder: folder of a decoder of the Llama family.
        token_and_loss_counts: (number of tokens, number of tokens with a loss) of each document.
    """
    with open(f"{model_folder}/config.json") as file:
        config: dict[str, Any] = json.load(file)
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    head_width = config.get("head_dim") or width // heads
    attention = 2 * width * head_width * (heads + shared)
    layer = attention + 3 * width * inner
    total = 0.0
    for tokens, learned in token_and_loss_counts:
        total += 6.0 * config["num_hidden_layers"] * layer * tokens
        total += 6.0 * config["vocab_size"] * width * learned
        # The attention scores and the weighted sums are two products, each with
        # head_width x tokens x tokens / 2 multiplications for each head.
        total += 6.0 * config["num_hidden_layers"] * heads * head_width * tokens**2
    return total
