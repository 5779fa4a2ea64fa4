"""Exact causal attention over packed documents.

Documents are concatenated in a single row. Only documents of similar length are padded to a common
width. A document attends to itself and to its prefix. A prefix that several documents share is
computed once. The backward pass is implemented here for two reasons. On a CPU, the backward pass of
the fused kernel takes twice as long in bf16. For many small documents, the overhead of the autograd
graph exceeds the cost of the attention.

``packed_attention`` is registered with transformers as an attention implementation. Without a
layout, it calls transformers' SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Name of the attention implementation in Transformers.
ATTENTION_NAME = "packed"
# Number of queries per tile of a long document. The last key of a tile is at its last query.
QUERY_BLOCK = 256
# Attention weights of tiles with up to this many keys (including the prefix) are saved for the
# backward pass. The weights of larger tiles are recomputed.
SAVED_WEIGHTS_MAX_KEYS = 768
# Maximum number of attention weights per tile of short documents. This number of weights fits into
# a core's cache.
TILE_MAX_WEIGHTS = 2**20


@dataclass(frozen=True)
class DocumentSpan:
    """Position of a document in the packed row: tokens [start, end).

    ``prefix`` is the start and the end, in the packed row, of the tokens that the document
    continues; (0, 0) is an empty prefix.
    """

    start: int
    end: int
    prefix: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Tile:
    """Queries [b, Lq] of b documents that are computed together, keys [b, Lk] and one prefix."""

    queries: Tensor | slice
    """Indices of the queries in the packed row, document after document, with padding."""
    keys: Tensor | slice
    """Indices of the keys in the packed row, document after document, with padding."""
    num_documents: int
    """Number b of documents."""
    unpadded: Tensor | None
    """Indices of the tokens that are not padding among the b * Lq tokens; None without padding."""
    unpadded_queries: Tensor | slice
    """Indices in the packed row of the queries that are not padding."""
    padding_mask: Tensor | None
    """[b, Lq], True for padding; None without padding."""
    prefix: slice | None
    """Position of the prefix in the packed row; None without a prefix."""
    mask: Tensor
    """[1, G * Lq, Lk], -inf for keys after their query. G is the number of query heads per key
    head."""
    width: int
    """Number Lq of query positions per document, including padding."""

    @property
    def prefix_length(self) -> int:
        """Number of tokens of the prefix; 0 without a prefix."""
        return self.prefix.stop - self.prefix.start if self.prefix else 0


class AttentionTiles:
    """Tiles of the attention over one packed row. All layers use the same layout.

    Args:
        spans: Documents, which cover the row without gaps. The prefix of a span is also a span, and
            is listed before it.
        heads: Number of query heads.
        key_heads: Number of key and value heads.
        dtype: Dtype of the masks.
        device: Device of the masks and indices.
    """

    def __init__(
        self,
        spans: Sequence[DocumentSpan],
        *,
        heads: int,
        key_heads: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.tiles: list[Tile] = []
        self._heads, self._dtype, self._device = heads, dtype, device
        self._groups = heads // key_heads
        by_prefix: dict[tuple[int, int], list[DocumentSpan]] = {}
        for span in spans:
            by_prefix.setdefault(span.prefix, []).append(span)
        for prefix, members in by_prefix.items():
            self._add_tiles(prefix, sorted(members, key=lambda span: span.end - span.start))

    def _add_tiles(self, prefix: tuple[int, int], members: list[DocumentSpan]) -> None:
        """Add the tiles of ``members``, which have this prefix and are sorted by length."""
        group: list[DocumentSpan] = []
        for span in members:
            length = span.end - span.start
            if length > QUERY_BLOCK:
                self._add_long_document(span)
                continue
            area = (len(group) + 1) * self._heads * length * (length + prefix[1] - prefix[0])
            shortest = group[0].end - group[0].start if group else length
            if group and (area > TILE_MAX_WEIGHTS or length > 1.25 * shortest + 8):
                self._add_tile_of_short_documents(prefix, group)
                group = []
            group.append(span)
        if group:
            self._add_tile_of_short_documents(prefix, group)

    def _add_long_document(self, span: DocumentSpan) -> None:
        """Add the tiles of one document, each with at most QUERY_BLOCK queries."""
        for start in range(span.start, span.end, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, span.end)
            mask = self._causal_mask(end - start, end - span.start)
            prefix = slice(*span.prefix) if span.prefix[1] else None
            queries, keys = slice(start, end), slice(span.start, end)
            self.tiles.append(
                Tile(queries, keys, 1, None, queries, None, prefix, mask, end - start)
            )

    def _add_tile_of_short_documents(
        self, prefix: tuple[int, int], members: list[DocumentSpan]
    ) -> None:
        """Add one tile for several documents, padded to the length of the last document.

        The documents are sorted by length, so the last document is the longest.
        """
        if len(members) == 1:
            self._add_long_document(members[0])
            return
        shared = slice(*prefix) if prefix[1] else None
        lengths = [span.end - span.start for span in members]
        width = lengths[-1]
        mask = self._causal_mask(width, width)
        starts = torch.tensor([span.start for span in members])
        offsets = torch.arange(width)
        real = offsets < torch.tensor(lengths)[:, None]
        ids = torch.where(real, starts[:, None] + offsets, starts[:, None]).flatten()
        real_indices = real.flatten().nonzero()[:, 0]
        ids, real_indices = ids.to(self._device), real_indices.to(self._device)
        unpadded, padding = (None, None) if real.all() else (real_indices, ~real.to(self._device))
        self.tiles.append(
            Tile(ids, ids, len(members), unpadded, ids[real_indices], padding, shared, mask, width)
        )

    def _causal_mask(self, queries: int, keys: int) -> Tensor:
        """Return the causal mask [1, G * queries, keys]; the queries are at the last keys."""
        blank = torch.full((queries, keys), -torch.inf, dtype=self._dtype, device=self._device)
        return blank.triu_(keys - queries + 1).repeat(self._groups, 1)[None]


class _PackedAttention(torch.autograd.Function):
    """Compute softmax(scale * q k^T + mask) v in tiles, for q [N, H, D] and k, v [N, Hkv, D].

    H is the number of query heads, and Hkv the number of key and value heads.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: AttentionTiles, scale: float
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        saved = []
        for tile in layout.tiles:
            queries, keys = _gather_at_queries(q, k.shape[1], tile), _gather_keys_or_values(k, tile)
            weights = _attention_weights(queries, keys, k, tile, scale)
            _write_at_queries(out, tile, _weighted_values(weights, v, tile))
            saved.append(weights if weights.shape[-1] <= SAVED_WEIGHTS_MAX_KEYS else None)
        ctx.save_for_backward(q, k, v, *[w for w in saved if w is not None])
        ctx.layout, ctx.scale, ctx.saved = layout, scale, [w is not None for w in saved]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, *stored = ctx.saved_tensors
        weights_of, key_heads = iter(stored), k.shape[1]
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        grad_k, grad_v = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        for tile, is_saved in zip(ctx.layout.tiles, ctx.saved, strict=True):
            queries, keys = _gather_at_queries(q, key_heads, tile), _gather_keys_or_values(k, tile)
            values, outer = (
                _gather_keys_or_values(v, tile),
                _gather_output_gradients(grad, key_heads, tile),
            )
            weights = (
                next(weights_of)
                if is_saved
                else _attention_weights(queries, keys, k, tile, ctx.scale)
            )
            shared = tile.prefix_length
            # Gradient of the weights; the keys of the prefix come first.
            grad_w = torch.bmm(outer, values.transpose(1, 2))
            if tile.prefix:
                by_head = _group_by_key_head(outer, key_heads) @ v[tile.prefix].permute(1, 2, 0)
                grad_w = torch.cat([by_head.view(*grad_w.shape[:2], shared), grad_w], -1)
            scores = torch._softmax_backward_data(grad_w, weights, -1, weights.dtype) * ctx.scale
            self_scores = scores[..., shared:]
            tile_grad_q = torch.bmm(self_scores, keys)
            _add_at_keys(grad_k, tile, torch.bmm(self_scores.transpose(1, 2), queries))
            _add_at_keys(grad_v, tile, torch.bmm(weights[..., shared:].transpose(1, 2), outer))
            if tile.prefix:
                by_head = _group_by_key_head(scores[..., :shared], key_heads)
                tile_grad_q += (by_head @ k[tile.prefix].transpose(0, 1)).view(tile_grad_q.shape)
                products = by_head.mT @ _group_by_key_head(queries, key_heads)
                grad_k[tile.prefix] += products.transpose(0, 1)
                by_head = _group_by_key_head(weights[..., :shared], key_heads)
                products = by_head.mT @ _group_by_key_head(outer, key_heads)
                grad_v[tile.prefix] += products.transpose(0, 1)
            _write_at_queries(grad_q, tile, tile_grad_q)
        return grad_q, grad_k, grad_v, None, None


def _gather_at_queries(x: Tensor, key_heads: int, tile: Tile) -> Tensor:
    """Return the rows of ``x`` [N, H, D] at the queries of a tile, [Hkv * b, G * Lq, D].

    In this layout, one matmul computes all G query heads of a key head.
    """
    groups = x.shape[1] // key_heads
    rows = x[tile.queries].view(tile.num_documents, -1, key_heads, groups, x.shape[2])
    folded = rows.permute(2, 0, 3, 1, 4)
    return folded.reshape(key_heads * tile.num_documents, -1, x.shape[2])


def _gather_output_gradients(grad: Tensor, key_heads: int, tile: Tile) -> Tensor:
    """Return the output gradients of a tile, [Hkv * b, G * Lq, D], with zeros for padding."""
    folded = _gather_at_queries(grad, key_heads, tile)
    if tile.padding_mask is not None:
        width = tile.padding_mask.shape[1]
        split = folded.view(key_heads, tile.num_documents, -1, width, grad.shape[2])
        split.masked_fill_(tile.padding_mask[:, None, :, None], 0.0)
    return folded


def _gather_keys_or_values(x: Tensor, tile: Tile) -> Tensor:
    """Return the rows of ``x`` [N, Hkv, D] at the keys of a tile, [Hkv * b, Lk, D]."""
    rows = x[tile.keys].view(tile.num_documents, -1, *x.shape[1:]).permute(2, 0, 1, 3)
    return rows.reshape(tile.num_documents * x.shape[1], -1, x.shape[2])


def _group_by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """Reshape [Hkv * b, G * Lq, -1] to [Hkv, b * G * Lq, -1].

    In this layout, one matmul per key head computes the prefix, which all its queries share.
    """
    return x.reshape(key_heads, -1, x.shape[-1])


def _attention_weights(
    queries: Tensor, keys: Tensor, all_keys: Tensor, tile: Tile, scale: float
) -> Tensor:
    """Return the attention weights of a tile, [Hkv * b, G * Lq, prefix length + Lk].

    ``queries`` and ``keys`` are those of the tile. Those of its prefix are read from ``all_keys``.
    """
    scores = torch.baddbmm(tile.mask, queries, keys.transpose(1, 2), alpha=scale)
    if tile.prefix:
        prefix_keys = all_keys[tile.prefix].permute(1, 2, 0)
        prefix_scores = _group_by_key_head(queries, all_keys.shape[1]) @ prefix_keys
        scores = torch.cat([(scale * prefix_scores).view(*scores.shape[:2], -1), scores], -1)
    return torch.softmax(scores, -1)


def _weighted_values(weights: Tensor, v: Tensor, tile: Tile) -> Tensor:
    """Return the outputs of a tile, which are the weighted sums of values, [Hkv * b, G * Lq, D]."""
    mixed = torch.bmm(weights[..., tile.prefix_length :], _gather_keys_or_values(v, tile))
    if tile.prefix:
        by_head = _group_by_key_head(weights[..., : tile.prefix_length], v.shape[1])
        mixed += (by_head @ v[tile.prefix].transpose(0, 1)).view(mixed.shape)
    return mixed


def _write_at_queries(out: Tensor, tile: Tile, folded: Tensor) -> None:
    """Write the outputs or the query gradients of a tile to the rows of its queries in ``out``.

    Args:
        out: Tensor [N, H, D], which is changed in place.
        tile: Tile whose queries are written.
        folded: Outputs or query gradients, [Hkv * b, G * Lq, D].
    """
    count = tile.num_documents
    heads, groups = len(folded) // count, folded.shape[1] // tile.width
    rows = folded.view(heads, count, groups, -1, folded.shape[-1]).permute(1, 3, 0, 2, 4)
    rows = rows.reshape(-1, heads * groups, folded.shape[-1])
    if tile.unpadded is not None:
        rows = rows[tile.unpadded]
    out[tile.unpadded_queries] = rows


def _add_at_keys(out: Tensor, tile: Tile, folded: Tensor) -> None:
    """Add the key or value gradients of a tile to the rows of its keys in ``out`` [N, Hkv, D]."""
    rows = folded.view(-1, tile.num_documents, *folded.shape[1:]).permute(1, 2, 0, 3)
    rows = rows.reshape(-1, *rows.shape[2:])
    if isinstance(tile.keys, slice):
        out[tile.keys] += rows
    else:  # In a tile of several documents, the keys are its queries, and keys of no other tile.
        rows = rows if tile.unpadded is None else rows[tile.unpadded]
        out[tile.unpadded_queries] = out[tile.unpadded_queries] + rows


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    packing: AttentionTiles | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention, with the signature of the attention interface of Transformers.

    Queries are [1, H, N, D], and keys and values are [1, Hkv, N, D]. The result is the outputs
    [1, N, H, D] and None instead of attention weights. Without a layout ``packing``, the SDPA
    implementation of Transformers is called.

    Raises:
        ValueError: A soft cap or attention sinks are passed with a layout.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"packed attention does not support {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _PackedAttention.apply(q, k, v, packing, scale)[None], None  # type: ignore[index]


AttentionInterface.register(ATTENTION_NAME, packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
