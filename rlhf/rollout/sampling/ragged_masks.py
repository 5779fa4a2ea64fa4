"""Build a model's attention masks for rows at different positions.

Transformers builds masks for batches whose new tokens have the same positions in every row. In a
batch of continued episodes, the positions differ between rows. Model families differ in the kinds
of masks (causal, sliding, chunked) and in the layers that use them, so this module evaluates the
model's own mask functions at the positions of each row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from rlhf.models.fast.varlen_attention import ATTENTION_NAME

# Attention implementations that take an additive mask [n, 1, L, K].
ADDITIVE_MASK_ATTENTION = ("eager", "sdpa", ATTENTION_NAME)


@contextlib.contextmanager
def ragged_masks(
    implementation: str, positions: torch.Tensor, width: int, dtype: torch.dtype
) -> Iterator[None]:
    """Return a context manager in which models build masks for the given positions.

    Args:
        implementation: Name of the model's attention implementation.
        positions: Positions [n, L] of the queries.
        width: Number of keys, which are at positions 0 .. width - 1.
        dtype: Dtype of the masks.
    """
    columns = torch.arange(width, device=positions.device)[None, None, None]
    queries = positions[:, None, :, None]
    rows = torch.arange(len(positions), device=positions.device)[:, None, None, None]
    heads = torch.zeros_like(rows)
    allowed = torch.zeros((), dtype=dtype, device=positions.device)

    def build_mask(*, mask_function: Callable[..., torch.Tensor], **settings: Any) -> torch.Tensor:
        attends = mask_function(rows, heads, queries, columns)
        return torch.where(attends, allowed, torch.finfo(dtype).min)

    ALL_MASK_ATTENTION_FUNCTIONS[implementation] = build_mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[implementation]
