"""Attention masks of rows that lie at different positions, by the model's own rules.

Transformers builds masks for a batch whose rows begin at one position. Families differ in the rules
(causal, sliding, chunked) and in which layer follows which. Here a model builds its own masks, and
only the positions at which its rules are asked are those of the rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from rlhf.models.fast.varlen_attention import ATTENTION_NAME

# Attention implementations that take an additive mask [n, 1, L, K].
MASKED = ("eager", "sdpa", ATTENTION_NAME)


@contextlib.contextmanager
def ragged_masks(
    implementation: str, positions: torch.Tensor, width: int, dtype: torch.dtype
) -> Iterator[None]:
    """While it lasts, masks that a model builds are for these rows.

    Args:
        implementation: of the model's attention.
        positions: [n, L] of the queries.
        width: columns of the keys, which lie at positions 0 .. width - 1.
        dtype: of the mask.
    """
    columns = torch.arange(width, device=positions.device)[None, None, None]
    queries = positions[:, None, :, None]
    rows = torch.arange(len(positions), device=positions.device)[:, None, None, None]
    heads = torch.zeros_like(rows)
    nothing = torch.zeros((), dtype=dtype, device=positions.device)

    def build(*, mask_function: Callable[..., torch.Tensor], **settings: Any) -> torch.Tensor:
        seen = mask_function(rows, heads, queries, columns)
        return torch.where(seen, nothing, torch.finfo(dtype).min)

    ALL_MASK_ATTENTION_FUNCTIONS[implementation] = build
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[implementation]
