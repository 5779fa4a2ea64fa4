"""Group rows into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlhf.models.fast.packing import add_rows_to_prefix_groups


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
            packed, a prefix that neighboring rows share counts once if it is computed once (see
            `group_neighbors_by_shared_prefix`). If rows are padded, padding counts too. A single
            group can exceed the maximum.
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
        return _join_groups_by_length(groups, lengths, max_tokens)
    return _join_groups_in_order(groups, tokens.cpu().numpy(), lengths, max_tokens)


def _join_groups_by_length(
    groups: list[list[int]], lengths: np.ndarray, max_tokens: int
) -> list[list[int]]:
    """Join groups of similar length to micro-batches. Padding counts as tokens."""
    batches: list[list[int]] = []
    for group in sorted(groups, key=lambda rows: max(lengths[row] for row in rows)):
        width = max(lengths[row] for row in group)
        if batches and (len(batches[-1]) + len(group)) * width <= max_tokens:
            batches[-1] += group
        else:
            batches.append(list(group))
    return batches


def _join_groups_in_order(
    groups: list[list[int]], tokens: np.ndarray, lengths: np.ndarray, max_tokens: int
) -> list[list[int]]:
    """Join consecutive groups to micro-batches.

    The tokens of a prefix that neighboring rows share are counted once if the model computes them
    once.
    """
    batches: list[list[int]] = []
    # The rows of the last micro-batch, grouped by shared prefix.
    prefix_groups: list[tuple[list[int], int]] = []
    size = 0
    for group in groups:
        prefix_groups = prefix_groups[-1:]  # earlier ones get no further rows
        added = add_rows_to_prefix_groups(prefix_groups, tokens, lengths, group)
        if not batches or size + added > max_tokens:
            batches.append([])
            prefix_groups, size = [], 0
            added = add_rows_to_prefix_groups(prefix_groups, tokens, lengths, group)
        batches[-1] += group
        size += added
    return batches
