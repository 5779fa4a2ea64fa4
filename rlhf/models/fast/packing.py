"""Pack several rows into one row without padding, so that shared prefixes are computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.errors import UserError, first_line
from rlhf.models.architecture import (
    has_recurrent_states,
    rotary_change_length,
    smallest_attention_window,
    text_config,
    trunk_of,
    unwrap_peft,
)
from rlhf.models.comparison import FORWARD_ERRORS
from rlhf.models.fast.tied_embedding import TiedEmbedding
from rlhf.models.fast.varlen_attention import ATTENTION_NAME, AttentionTiles, DocumentSpan

# Minimum number of tokens that a shared prefix must save, because it needs two more matmuls per
# layer.
MIN_SAVED_TOKENS = 32


@dataclass(frozen=True)
class PackedRows:
    """Rows [B, T] packed into one row of N tokens, which contains each shared prefix once."""

    tokens: Tensor  # [1, N]
    positions: Tensor  # [1, N] position of each token within its row
    index: Tensor  # [B, T] index of each token in the packed row; 0 for padding
    spans: tuple[DocumentSpan, ...]  # the prefixes and the remaining tokens of the rows


def pack(tokens: Tensor, attention_mask: Tensor) -> PackedRows:
    """Pack padded rows into one row.

    A common prefix of neighboring rows, such as the prompt of several completions, is packed once
    (see ``group_neighbors_by_shared_prefix``).

    Args:
        tokens: [B, T], padded on the right.
        attention_mask: [B, T], True for tokens that are not padding.
    """
    rows = tokens.cpu().numpy()
    lengths = attention_mask.sum(1).cpu().numpy()
    index = np.zeros(rows.shape, dtype=np.int64)
    pieces, positions, spans = [], [], []
    count = 0

    def append(row: int, start: int, end: int) -> tuple[int, int]:
        """Append tokens [start, end) of a row. Return their start and end in the packed row."""
        nonlocal count
        span = (count, count + end - start)
        index[row, start:end] = np.arange(*span)
        pieces.append(rows[row, start:end])
        positions.append(np.arange(start, end))
        count = span[1]
        return span

    for members, shared in group_neighbors_by_shared_prefix(rows, lengths):
        prefix = (0, 0)
        if shared:
            prefix = append(members[0], 0, shared)
            index[members, :shared] = np.arange(*prefix)
            spans.append(DocumentSpan(*prefix))
        for row in members:
            if lengths[row] > shared:
                spans.append(DocumentSpan(*append(row, shared, lengths[row]), prefix))
    device = tokens.device
    return PackedRows(
        torch.from_numpy(np.concatenate(pieces))[None].to(device),
        torch.from_numpy(np.concatenate(positions))[None].to(device),
        torch.from_numpy(index).to(device),
        tuple(spans),
    )


def group_neighbors_by_shared_prefix(
    rows: np.ndarray, lengths: np.ndarray
) -> list[tuple[list[int], int]]:
    """Group neighboring rows by their common prefix.

    A row is added to the previous group if this increases the number of saved tokens, and if the
    group then saves at least ``MIN_SAVED_TOKENS`` tokens.

    Args:
        rows: Token ids [B, T], padded on the right.
        lengths: Lengths of the rows, [B].

    Returns:
        For each group, the indices of its rows and the length of their shared prefix. The length is
        0 for a group of one row.
    """
    groups: list[tuple[list[int], int]] = []
    add_rows_to_prefix_groups(groups, rows, lengths, range(len(rows)))
    return [(members, shared if len(members) > 1 else 0) for members, shared in groups]


def add_rows_to_prefix_groups(
    groups: list[tuple[list[int], int]],
    tokens: np.ndarray,
    lengths: np.ndarray,
    rows: Sequence[int],
) -> int:
    """Add the next rows to the last group or as new groups, in place.

    Args:
        groups: Groups as in `group_neighbors_by_shared_prefix`, except that the prefix of a single
            row is the whole row. A list of row indices is replaced and not modified, so that a
            shallow copy of ``groups`` is independent.
        tokens: Token ids [B, T], padded on the right.
        lengths: Lengths of the rows, [B].
        rows: Indices of the added rows.

    Returns:
        The number of further tokens that the model computes.
    """
    saved = -count_saved_tokens(groups)
    for row in rows:
        members, shared = groups[-1] if groups else ([], 0)
        common = common_prefix_length(tokens, lengths, members[0], row) if members else 0
        together = min(shared, common)
        if together * len(members) > max(shared * (len(members) - 1), MIN_SAVED_TOKENS - 1):
            groups[-1] = ([*members, row], together)
        else:
            groups.append(([row], int(lengths[row])))
    saved += count_saved_tokens(groups)
    return int(lengths[list(rows)].sum()) - saved


def count_saved_tokens(groups: Iterable[tuple[list[int], int]]) -> int:
    """Return the number of tokens that are not computed because they are in a shared prefix."""
    return sum((len(members) - 1) * shared for members, shared in groups)


def common_prefix_length(
    rows: np.ndarray, lengths: np.ndarray, first_row: int, second_row: int
) -> int:
    """Return the length of the common prefix of two rows."""
    width = int(min(lengths[first_row], lengths[second_row]))
    differs = rows[first_row, :width] != rows[second_row, :width]
    return int(differs.argmax()) if differs.any() else width


def count_computed_tokens(tokens: Tensor, attention_mask: Tensor, *, packed: bool) -> int:
    """Return the number of tokens in a forward pass over rows [B, T].

    In packed rows, shared prefixes count once. In padded rows, padding is included.
    """
    if not packed:
        return tokens.numel()
    rows, lengths = tokens.cpu().numpy(), attention_mask.sum(1).cpu().numpy()
    return int(lengths.sum()) - count_saved_tokens(group_neighbors_by_shared_prefix(rows, lengths))


def flat_states_and_token_index(
    model: Any,
    tokens: Tensor,
    attention_mask: Tensor,
    *,
    trunk: Any = None,
    tied: TiedEmbedding | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the last hidden states of all tokens as one list [N, D], and the index of each token.

    Rows are packed if the model uses packed attention, and padded otherwise. Packed attention has
    no sliding window, so a batch with a row longer than the window is padded too. The states of
    real tokens are the same in both cases, because padding is on the right. If padding changes the
    states of a model (see ``verification``), its rows are computed one by one.

    Args:
        model: Decoder with any head.
        tokens: [B, T], padded on the right.
        attention_mask: [B, T], True for tokens that are not padding.
        trunk: Decoder of the same architecture. By default, the model's own decoder is used.
        tied: Embedding table. By default, the decoder's own embedding is used.

    Returns:
        States [N, D], and the index [B, T] of the state after each token.
    """
    trunk = trunk_of(model) if trunk is None else trunk
    if getattr(trunk, "reads_single_rows", False):
        return states_and_index_row_by_row(trunk, tokens, attention_mask, tied=tied)
    lengths = attention_mask.sum(1)
    config = text_config(trunk)
    limit = rotary_change_length(config)
    if limit is not None and lengths.max() > limit:
        return _states_and_index_by_row_length(
            trunk, tokens, attention_mask, limit=limit, tied=tied
        )
    return _states_and_index_of_batch(trunk, tokens, attention_mask, tied=tied)


def states_and_index_row_by_row(
    trunk: Any, tokens: Tensor, attention_mask: Tensor, *, tied: TiedEmbedding | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `flat_states_and_token_index` row by row, for states that depend on padding."""
    index = torch.zeros_like(tokens)
    index[attention_mask] = torch.arange(int(attention_mask.sum()), device=tokens.device)
    states = []
    for row, row_mask in zip(tokens, attention_mask, strict=True):
        reset_dynamic_rotary_frequencies(trunk)
        output = trunk(**decoder_inputs(row[None, row_mask], tied), use_cache=False)
        states.append(output.last_hidden_state[0])
    return torch.cat(states), index


def _states_and_index_by_row_length(
    trunk: Any, tokens: Tensor, attention_mask: Tensor, *, limit: int, tied: TiedEmbedding | None
) -> tuple[Tensor, Tensor]:
    """Compute the states and index of rows whose rotary frequencies depend on their length.

    A model uses the frequencies of the longest row for a whole batch. Therefore, all rows with at
    most ``limit`` tokens form one batch, and longer rows form one batch per length.
    """
    lengths = attention_mask.sum(1)
    index = torch.zeros_like(tokens)
    states: list[Tensor] = []
    offset = 0
    for length in [0, *lengths[lengths > limit].unique().tolist()]:
        rows = (lengths == length if length else lengths <= limit).nonzero()[:, 0]
        if not len(rows):
            continue
        width = int(lengths[rows].max())
        reset_dynamic_rotary_frequencies(trunk)
        new_states, new_index = _states_and_index_of_batch(
            trunk, tokens[rows, :width], attention_mask[rows, :width], tied=tied
        )
        index[rows, :width] = new_index + offset
        states.append(new_states)
        offset += len(new_states)
    return torch.cat(states), index


def reset_dynamic_rotary_frequencies(trunk: Any) -> None:
    """Reset dynamic rotary frequencies, which would depend on the longest earlier input."""
    for module in trunk.modules():
        original = getattr(module, "original_inv_freq", None)
        if isinstance(original, Tensor) and "dynamic" in str(getattr(module, "rope_type", "")):
            module.inv_freq = original.to(module.inv_freq.device)
            module.max_seq_len_cached = module.original_max_seq_len


def _states_and_index_of_batch(
    trunk: Any, tokens: Tensor, attention_mask: Tensor, *, tied: TiedEmbedding | None
) -> tuple[Tensor, Tensor]:
    """Compute ``flat_states_and_token_index`` of rows with equal rotary frequencies."""
    if not packs_rows(trunk, attention_mask.sum(1)):
        mask = attention_mask.long()
        inputs = decoder_inputs(tokens, tied)
        states = trunk(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
        index = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
        return states.flatten(0, 1), index
    packed = pack(tokens, attention_mask)
    layout = attention_tiles_of(packed, trunk)
    return states_of_packed_rows(trunk, packed, layout, tied=tied), packed.index


def attention_tiles_of(packed: PackedRows, trunk: Any) -> AttentionTiles:
    """Return the tiles of a decoder's attention over packed rows."""
    config = text_config(trunk)
    heads = config.num_attention_heads
    return AttentionTiles(
        packed.spans,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        dtype=trunk.dtype,
        device=packed.tokens.device,
    )


def states_of_packed_rows(
    trunk: Any, packed: PackedRows, layout: AttentionTiles, *, tied: TiedEmbedding | None
) -> Tensor:
    """Return the last hidden states [N, D] of packed rows."""
    states = trunk(
        **decoder_inputs(packed.tokens, tied),
        position_ids=packed.positions,
        # Transformers uses a four-dimensional mask unchanged.
        attention_mask=packed.tokens.new_zeros(1, 1, 1, 1),
        packing=layout,
        use_cache=False,
    ).last_hidden_state
    return states[0]


def decoder_inputs(tokens: Tensor, tied: TiedEmbedding | None) -> dict[str, Tensor]:
    """Return the decoder's input argument for tokens [B, T]: ids, or the embeddings by ``tied``."""
    return {"input_ids": tokens} if tied is None else {"inputs_embeds": tied.embed(tokens)}


def uses_packed_attention(trunk: Any) -> bool:
    """Return whether a decoder uses packed attention."""
    return text_config(trunk)._attn_implementation == ATTENTION_NAME


def packs_rows(trunk: Any, row_lengths: Tensor) -> bool:
    """Return whether the decoder packs rows with these lengths [B].

    The decoder must use packed attention, `disable_row_packing` must not have been called, and no
    row may be longer than the attention window.
    """
    window = smallest_attention_window(text_config(trunk))
    fits = window is None or bool(row_lengths.max() <= window)
    return uses_packed_attention(trunk) and fits and not getattr(trunk, "pads_all_rows", False)


def disable_row_packing(model: Any) -> None:
    """Make a causal model pad the rows of all batches, although its attention can pack them."""
    trunk_of(model).pads_all_rows = True


def select_attention_without_packing(model: Any, name: str) -> None:
    """Select an attention implementation of Transformers instead of packed attention.

    Raises:
        UserError: The implementation is not available, or the model does not support it.
    """
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = first_line(error)
        raise UserError(f"model.attn_implementation {name}: {reason}") from error
    if model.config._attn_implementation != name:
        raise UserError(
            f"model.attn_implementation {name} is not supported by {type(model).__name__}, which "
            f"uses {model.config._attn_implementation}: remove the key"
        )
    model.keeps_attention = True


def enable_packing(model: Any) -> bool:
    """Enable packed attention in a causal model whose layers allow it.

    The module ``verification`` then checks that the hidden states are unchanged.

    Returns:
        Whether the model now packs rows.
    """
    inner, trunk = unwrap_peft(model), trunk_of(model)
    if uses_packed_attention(trunk):
        return True
    if getattr(inner, "keeps_attention", False) or getattr(trunk, "never_packs", False):
        return False
    if has_recurrent_states(text_config(inner)):  # they would continue into the next document
        return False
    before = inner.config._attn_implementation
    try:
        inner.set_attn_implementation(ATTENTION_NAME)
    except FORWARD_ERRORS:
        inner.set_attn_implementation(before)
        return False
    trunk.attention_before_packing = before
    return uses_packed_attention(trunk)
