"""Counts with their nouns."""

from rlhf.common.text import count_text


def test_a_count_has_the_number_of_its_noun():
    texts = [count_text(n, "prompt") for n in (0, 1, 2, 1000)]
    assert texts == ["0 prompts", "1 prompt", "2 prompts", "1,000 prompts"]
    assert [count_text(n, "batch", "batches") for n in (1, 2)] == ["1 batch", "2 batches"]
