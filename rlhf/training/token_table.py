"""Numbers of every sampled token of an episode, for transcripts in reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf.algorithms.batch import TrainingBatch

# Number of tokens per transcript; more would make samples.jsonl larger than the model.
TOKENS_KEPT = 512


def token_table(batch: TrainingBatch, row: int, tokenizer: Any) -> dict[str, list[Any]]:
    """Columns over the sampled tokens of one episode, the first ``TOKENS_KEPT`` of them.

    Returns:
        ``text`` (the pieces of a turn joined are its completion), ``turn``, ``reward`` (the one
        trained on, before KL and cost penalties), ``advantage``, ``entropy`` (nats, at the sampling
        temperature); with a reference ``kl`` (log policy / reference, nats); with a critic
        ``value``. Numbers have four significant digits.
    """
    index = batch.action_mask[row].nonzero()[:TOKENS_KEPT, 0]
    columns = {
        "reward": batch.require("rewards"),
        "advantage": batch.require("advantages"),
        "entropy": batch.require("entropy"),
    }
    if batch.ref_logprobs is not None:
        columns["kl"] = batch.require("old_logprobs") - batch.ref_logprobs
    if batch.values is not None:
        columns["value"] = batch.values
    ids, turns = batch.tokens[row, index].tolist(), batch.require("turns")[row, index].tolist()
    text = []
    for turn in sorted(set(turns)):
        turn_ids = [token for token, number in zip(ids, turns, strict=True) if number == turn]
        text += pieces(
            turn_ids, lambda some: tokenizer.decode(some, clean_up_tokenization_spaces=False)
        )
    numbers = {name: _rounded(column[row, index]) for name, column in columns.items()}
    return {"turn": turns, "text": text, **numbers}


def pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Text that each token adds.

    A character made of several tokens is counted to the last of them.
    """
    result, length = [], 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        if end < len(ids):
            text = text.rstrip("\ufffd")  # an incomplete character
        result.append(text[length:])
        length = max(length, len(text))
    return result


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
