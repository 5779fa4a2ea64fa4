"""How fast this machine multiplies matrices: what a model's arithmetic could reach at best."""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks.worker import Job, StepTimer

SIZE = 2048
PRODUCTS = 32


def matmul(job: Job, timer: StepTimer) -> None:
    """Products of square bf16 matrices. Work: floating-point operations."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(SIZE, SIZE, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty_like(one)

    def step() -> float:
        for _ in range(PRODUCTS):
            torch.matmul(one, other, out=out)
        return PRODUCTS * 2.0 * SIZE**3

    timer.loop(step)


def model_flops(model: str, texts: list[tuple[int, int]]) -> float:
    """Floating-point operations of one forward and backward pass; nothing is computed twice.

    Two for each weight and token forward, four backward; attention to the tokens before. The output
    head counts where a token is learned, which is all that the loss needs.

    Args:
        model: folder of a decoder of the Llama family.
        texts: (tokens, learned tokens) of each document.
    """
    with open(f"{model}/config.json") as file:
        config: dict[str, Any] = json.load(file)
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    head_width = config.get("head_dim") or width // heads
    attention = 2 * width * head_width * (heads + shared)
    layer = attention + 3 * width * inner
    total = 0.0
    for tokens, learned in texts:
        total += 6.0 * config["num_hidden_layers"] * layer * tokens
        total += 6.0 * config["vocab_size"] * width * learned
        # Scores and weighted sums: two products of tokens x tokens / 2 for each head.
        total += 6.0 * config["num_hidden_layers"] * heads * head_width * tokens**2
    return total
