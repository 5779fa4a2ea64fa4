"""Packed attention against attention written out with one dense mask."""

import pytest
import torch

from rlhf.models.fast.varlen_attention import (
    QUERY_BLOCK,
    SAVED_WEIGHTS_MAX_KEYS,
    AttentionTiles,
    DocumentSpan,
    packed_attention,
)

SCALE = 0.3


def dense(q, k, v, spans):
    """Softmax attention in which a token sees its own span up to itself, and the span's prefix."""
    count, heads, _ = q.shape
    sees = torch.zeros(count, count, dtype=torch.bool)
    for span in spans:
        for t in range(span.start, span.end):
            sees[t, span.start : t + 1] = True
            sees[t, span.prefix[0] : span.prefix[1]] = True
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * SCALE
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)


def packed(q, k, v, spans):
    shape = {"heads": q.shape[1], "key_heads": k.shape[1]}
    layout = AttentionTiles(spans, **shape, dtype=q.dtype, device=q.device)
    inputs = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, _ = packed_attention(torch.nn.Module(), *inputs, None, scaling=SCALE, packing=layout)
    return out[0]


def of_lengths(*lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [DocumentSpan(end - length, end) for end, length in zip(ends, lengths, strict=True)]


LONG = 2 * QUERY_BLOCK + 7
LAYOUTS = {
    "one": of_lengths(9),
    "equal": of_lengths(6, 6, 6),
    "ragged": of_lengths(6, 1, 7, 30, 5, 2),
    "long": of_lengths(3, LONG, 4),
    "weights made again": of_lengths(SAVED_WEIGHTS_MAX_KEYS + 9),
    "shared": [
        *of_lengths(5, 7),
        DocumentSpan(12, 14, (5, 12)),
        DocumentSpan(14, 19, (5, 12)),
        DocumentSpan(19, 25),
    ],
    "one continuation": [DocumentSpan(0, 4), DocumentSpan(4, 9, (0, 4))],
    "two prefixes": [
        *(DocumentSpan(0, 8), DocumentSpan(8, 10, (0, 8)), DocumentSpan(10, 12, (0, 8))),
        *(DocumentSpan(12, 15), DocumentSpan(15, 16, (12, 15)), DocumentSpan(16, 21, (12, 15))),
    ],
    "long continuation": [
        DocumentSpan(0, 300),
        DocumentSpan(300, 304, (0, 300)),
        DocumentSpan(304, 304 + LONG, (0, 300)),
    ],
}


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_and_gradients_are_those_of_dense_attention(name, heads):
    spans = LAYOUTS[name]
    generator = torch.Generator().manual_seed(len(name))
    shapes = [(spans[-1].end, count, 8) for count in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64, generator=generator)
    results = []
    for attend in (packed, dense):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves, spans)
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_documents_do_not_see_each_other():
    spans = of_lengths(6, 1, 7)
    q, k, v = (torch.randn(14, 2, 8, dtype=torch.float64) for _ in range(3))
    before = packed(q, k, v, spans)
    for x in (q, k, v):
        x[7:] = torch.randn_like(x[7:]) * 100
    torch.testing.assert_close(packed(q, k, v, spans)[:7], before[:7], rtol=0, atol=0)


def test_features_it_does_not_have_are_refused():
    shape = {"heads": 1, "key_heads": 1}
    layout = AttentionTiles(of_lengths(2), **shape, dtype=torch.float32, device=torch.device("cpu"))
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="softcap"):
        packed_attention(torch.nn.Module(), x, x, x, None, packing=layout, softcap=30.0)
