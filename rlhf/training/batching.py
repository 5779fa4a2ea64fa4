"""Which rows go through the model together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from rlhf.models.fast.packing import common_prefix


def micro_batches(
    tokens: torch.Tensor,
    attention_mask: torch.Tensor,
    units: Sequence[int],
    *,
    max_tokens: int,
    packed: bool,
) -> list[list[int]]:
    """Rows in portions of at most ``max_tokens``; units stay whole.

    Args:
        tokens: [B, T], padded on the right.
        attention_mask: [B, T].
        units: rows of equal number share a portion; a unit longer than that is one of its own.
        max_tokens: that the model computes for one portion: what rows share counts once where they
            are packed, and padding counts where they are not.
        packs: whether rows are packed. Their order then stays, so that the completions of a prompt
            keep together; otherwise rows of similar length meet.
    """
    lengths = attention_mask.sum(1).cpu().numpy()
    members: dict[int, list[int]] = {}
    for row, unit in enumerate(units):
        members.setdefault(unit, []).append(row)
    portions = list(members.values())
    if packed:
        return _in_order(portions, tokens.cpu().numpy(), lengths, max_tokens)
    return _by_length(portions, lengths, max_tokens)


def _in_order(
    portions: list[list[int]], rows: np.ndarray, lengths: np.ndarray, max_tokens: int
) -> list[list[int]]:
    batches: list[list[int]] = []
    size = 0
    for portion in portions:
        before = batches[-1][-1:] if batches else []
        chain = [*before, *portion]
        pairs = itertools.pairwise(chain)
        shared = [common_prefix(rows, lengths, first, second) for first, second in pairs]
        whole = int(lengths[portion].sum())
        if batches and size + whole - sum(shared) <= max_tokens:
            batches[-1] += portion
            size += whole - sum(shared)
        else:
            batches.append(list(portion))
            size = whole - sum(shared[len(before) :])
    return batches


def _by_length(portions: list[list[int]], lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for portion in sorted(portions, key=lambda rows: max(lengths[row] for row in rows)):
        width = max(lengths[row] for row in portion)
        if batches and (len(batches[-1]) + len(portion)) * width <= max_tokens:
            batches[-1] += portion
        else:
            batches.append(list(portion))
    return batches
