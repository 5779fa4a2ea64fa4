"""Group rows into micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from rlhf.models.fast.packing import common_prefix_length


def group_into_micro_batches(
    tokens: torch.Tensor,
    attention_mask: torch.Tensor,
    group_ids: Sequence[int],
    *,
    max_tokens: int,
    packed: bool,
) -> list[list[int]]:
    """Group rows into micro-batches of at most ``max_tokens`` tokens.

    Args:
        tokens: [B, T] token ids, padded on the right.
        attention_mask: [B, T], True for tokens that are not padding.
        group_ids: [B] ids. The rows of a group, such as the two replies of a pair, are placed in
            the same micro-batch.
        max_tokens: Maximum number of tokens that the model computes for a micro-batch. If rows are
            packed, a prefix that neighboring rows share counts once. If rows are padded, padding
            counts too. A single group can exceed the maximum.
        packed: Whether rows are packed instead of padded. Packed groups keep their order, so that
            completions of a prompt stay neighbors. Padded groups are sorted by length.

    Returns:
        The row indices of each micro-batch.
    """
    lengths = attention_mask.sum(1).cpu().numpy()
    rows_of_group: dict[int, list[int]] = {}
    for row, group_id in enumerate(group_ids):
        rows_of_group.setdefault(group_id, []).append(row)
    groups = list(rows_of_group.values())
    if not packed:
        return _group_by_length(groups, lengths, max_tokens)
    return _group_in_order(groups, tokens.cpu().numpy(), lengths, max_tokens)


def _group_by_length(
    groups: list[list[int]], lengths: np.ndarray, max_tokens: int
) -> list[list[int]]:
    """Join groups of similar length. Padding to the longest row counts."""
    batches: list[list[int]] = []
    for group in sorted(groups, key=lambda rows: max(lengths[row] for row in rows)):
        width = max(lengths[row] for row in group)
        if batches and (len(batches[-1]) + len(group)) * width <= max_tokens:
            batches[-1] += group
        else:
            batches.append(list(group))
    return batches


def _group_in_order(
    groups: list[list[int]], tokens: np.ndarray, lengths: np.ndarray, max_tokens: int
) -> list[list[int]]:
    """Join consecutive groups. A prefix that neighboring rows share counts once."""
    batches: list[list[int]] = []
    size = 0
    for group in groups:
        previous = batches[-1][-1:] if batches else []
        chain = [*previous, *group]
        pairs = itertools.pairwise(chain)
        shared = [common_prefix_length(tokens, lengths, first, second) for first, second in pairs]
        num_tokens = int(lengths[group].sum())
        if batches and size + num_tokens - sum(shared) <= max_tokens:
            batches[-1] += group
            size += num_tokens - sum(shared)
        else:
            batches.append(list(group))
            size = num_tokens - sum(shared[len(previous) :])
    return batches
