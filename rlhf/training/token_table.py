"""What a training step knew of every sampled token, for people to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf.training.experience import Experience

# A transcript's first tokens; the rest would make samples.jsonl larger than the model.
TOKENS_KEPT = 512


def token_table(experience: Experience, row: int, tokenizer: Any) -> dict[str, list[Any]]:
    """Columns over the sampled tokens of one episode, the first ``TOKENS_KEPT`` of them.

    Returns:
        ``text`` (the pieces of a turn joined are its reply), ``turn``, ``reward`` (as learned from,
        before a penalty on the divergence), ``advantage``, ``entropy`` (nats, at the temperature
        of sampling), with a reference ``kl`` (log policy / reference, nats), with a critic
        ``value``. Numbers have four digits.
    """
    batch, places = experience.batch, experience.batch.action_mask[row].nonzero()[:TOKENS_KEPT, 0]
    tables = {
        "reward": batch.rewards,
        "advantage": experience.credit.advantages,
        "entropy": experience.entropy,
    }
    if experience.ref_logprobs is not None:
        tables["kl"] = experience.old_logprobs - experience.ref_logprobs
    if experience.old_values is not None:
        tables["value"] = experience.old_values
    ids, turns = batch.tokens[row, places].tolist(), batch.turns[row, places].tolist()
    text = []
    for turn in sorted(set(turns)):
        own = [token for token, its in zip(ids, turns, strict=True) if its == turn]
        text += pieces(own, lambda part: tokenizer.decode(part, clean_up_tokenization_spaces=False))
    numbers = {name: _short(table[row, places]) for name, table in tables.items()}
    return {"turn": turns, "text": text, **numbers}


def pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """What each token adds to the text; of a character made of several tokens, the last one."""
    found, said = [], 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        if end < len(ids):
            text = text.rstrip("\ufffd")  # half a character
        found.append(text[said:])
        said = max(said, len(text))
    return found


def _short(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
