"""Portions of rows: every row once, units whole, the limit kept."""

import itertools

import pytest
import torch

from rlhf.models.fast import packing
from rlhf.models.fast.packing import count_computed_tokens
from rlhf.training.batching import group_into_micro_batches


def rows(*texts):
    width = max(map(len, texts))
    tokens = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for index, text in enumerate(texts):
        tokens[index, : len(text)] = torch.tensor([ord(c) for c in text])
        mask[index, : len(text)] = True
    return tokens, mask


def test_padded_rows_of_similar_length_meet():
    tokens, mask = rows("a" * 5, "b" * 9, "c" * 5, "d" * 3, "e" * 3, "f" * 9)
    batches = group_into_micro_batches(
        tokens, mask, [0, 1, 0, 2, 3, 1], max_tokens=12, packed=False
    )
    # Shortest first: rows 3 and 4 (6 tokens); the pairs are units of their own.
    assert [sorted(batch) for batch in batches] == [[3, 4], [0, 2], [1, 5]]


def test_packed_rows_keep_their_order_and_count_what_they_share_once(monkeypatch):
    monkeypatch.setattr(packing, "MIN_SAVED_TOKENS", 1)
    tokens, mask = rows("prompt-a", "prompt-b", "prompt-c", "other")
    # 8 + 1 + 1 tokens, then 5 more.
    batches = group_into_micro_batches(tokens, mask, range(4), max_tokens=10, packed=True)
    assert batches == [[0, 1, 2], [3]]
    assert group_into_micro_batches(tokens, mask, range(4), max_tokens=15, packed=True) == [
        [0, 1, 2, 3]
    ]
    assert group_into_micro_batches(tokens, mask, range(4), max_tokens=9, packed=True) == [
        [0, 1],
        [2],
        [3],
    ]


@pytest.mark.parametrize("prefix", [0, 20, 40])
@pytest.mark.parametrize("size", [1, 2])
def test_the_model_computes_at_most_the_limit(prefix, size):
    """A short prefix, such as that of a chat template, is computed for every row."""
    generator = torch.Generator().manual_seed(prefix)
    lengths = torch.randint(prefix + 1, prefix + 20, (60,), generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.randint(1, 50, mask.shape, generator=generator)
    tokens[:, :prefix] = 1
    units = [row // size for row in range(60)]
    limit = 300
    batches = group_into_micro_batches(tokens, mask, units, max_tokens=limit, packed=True)

    def computed(rows):
        return count_computed_tokens(tokens[rows], mask[rows], packed=True)

    assert list(itertools.chain(*batches)) == list(range(60))
    for batch, following in itertools.pairwise(batches):
        assert computed(batch) <= limit < computed(batch + following[:size])


def test_packed_units_stay_whole_even_beyond_the_limit():
    tokens, mask = rows("aaaa", "bbbb", "cccc", "dddd")
    batches = group_into_micro_batches(tokens, mask, [0, 1, 0, 1], max_tokens=3, packed=True)
    assert batches == [[0, 2], [1, 3]]


def test_every_row_stands_in_one_portion():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (50,), generator=generator)
    mask = torch.arange(20) < lengths[:, None]
    tokens = torch.randint(1, 3, (50, 20), generator=generator)
    for packed in (True, False):
        for limit in (1, 30, 10_000):
            batches = group_into_micro_batches(
                tokens, mask, range(50), max_tokens=limit, packed=packed
            )
            assert sorted(row for batch in batches for row in batch) == list(range(50))
