"""Loss of a model on held-out completions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data.messages import RowDropped
from rlhf.models.policy import Policy
from rlhf.rollout.chat_format import (
    ChatFormat,
    encode_example,
    generation_stop_ids,
    prompt_of,
)
from rlhf.rollout.plain_text import encode_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompletionLosses:
    """Loss of each row's completion."""

    nats: list[float]
    """Summed negative log-likelihood of each completion."""
    tokens: list[int]
    """Tokens of each completion."""
    bytes: list[int]
    """UTF-8 bytes of each completion's tokens."""
    truncated: int
    """Rows that were truncated to the maximum length."""
    emptied: int
    """Truncated rows without any completion token left."""


@torch.no_grad()
def completion_losses(
    policy: Policy, rows: Sequence[dict[str, Any]], *, max_length: int, batch_size: int = 8
) -> CompletionLosses:
    """Negative log-likelihood of each row's completion.

    Args:
        policy: the model.
        rows: canonical SFT rows; for plain text, all tokens but the first are the completion.
        max_length: maximum number of tokens of one example; the rest is truncated. Rows whose
            prompt alone reaches it have 0 tokens, and so have rows that the chat template rejects;
            both are counted in the log.
        batch_size: examples in one forward pass.
    """
    whole, changes = _encode(policy, rows)
    truncated = [any(mask[:max_length]) for ids, mask in whole if len(ids) > max_length]
    changes["truncated"] = len(truncated)
    if summary := ", ".join(f"{count:,} {what}" for what, count in changes.items() if count):
        log.info("text: %s", summary)
    encoded = [(ids[:max_length], mask[:max_length]) for ids, mask in whole]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    nats = [0.0] * len(rows)
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        for index, loss in zip(indices, _batch_losses(policy, encoded, indices), strict=True):
            nats[index] = loss
    sizes = []
    for ids, mask in encoded:
        completion = [token for token, is_action in zip(ids, mask, strict=True) if is_action]
        text = policy.tokenizer.decode(completion, skip_special_tokens=True)
        sizes.append(len(text.encode()))
    counts = [sum(mask) for _, mask in encoded]
    return CompletionLosses(nats, counts, sizes, len(truncated), truncated.count(False))


def _batch_losses(
    policy: Policy, encoded: Sequence[tuple[list[int], list[bool]]], indices: Sequence[int]
) -> list[float]:
    """Summed negative log-likelihood of the examples at `indices`, in one padded batch."""
    shape = len(indices), max(len(encoded[i][0]) for i in indices)
    tokens = torch.full(shape, policy.tokenizer.pad_token_id)
    attention = torch.zeros(shape, dtype=torch.bool)
    actions = torch.zeros(shape, dtype=torch.bool)
    for row, index in enumerate(indices):
        ids, mask = encoded[index]
        tokens[row, : len(ids)] = torch.tensor(ids)
        attention[row, : len(ids)] = True
        actions[row, : len(ids)] = torch.tensor(mask)
    device = policy.device
    scored = policy.score(tokens.to(device), attention.to(device), actions.to(device))
    return [-float(scored.logprobs[row].sum()) for row in range(len(indices))]


def _encode(
    policy: Policy, rows: Sequence[dict[str, Any]]
) -> tuple[list[tuple[list[int], list[bool]]], Counter[str]]:
    """Token ids and completion mask of each row, and counts of dropped or changed rows by reason.

    A row that cannot be encoded has no completion tokens.
    """
    chat_format = ChatFormat(policy.tokenizer, stop_ids=generation_stop_ids(policy.model))
    encoded, changes = [], Counter()
    for row in rows:
        notes: Counter[str] = Counter()
        try:
            if "text" in row:
                ids, mask = encode_text(policy.tokenizer, row["text"])
            else:
                ids, mask = encode_example(
                    chat_format, prompt_of(row), row["completion"], notes=notes
                )
        except RowDropped as reason:
            changes[f"left out: {reason}"] += 1
            ids, mask = [policy.tokenizer.pad_token_id], [False]
        changes += Counter({what: 1 for what in notes})
        encoded.append((ids, mask))
    return encoded, changes
