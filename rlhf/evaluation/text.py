"""Compute the loss of a model on held-out completions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from rlhf.data.messages import RowDropped
from rlhf.models.policy import Policy
from rlhf.reward_models.chat_template import prompt_with_tools
from rlhf.rollout.chat_format import ChatFormat, generation_stop_ids
from rlhf.rollout.demonstrations import encode_example
from rlhf.rollout.plain_text import encode_text_and_loss_mask

log = logging.getLogger(__name__)

Example = tuple[list[int], list[bool]]
"""Token ids [T] and completion mask [T]."""


@dataclass(frozen=True)
class CompletionLosses:
    """Loss of each row's completion."""

    nats: list[float]
    """Negative log-likelihood of each completion, summed over its tokens."""
    tokens: list[int]
    """Number of tokens of each completion, after truncation."""
    bytes: list[int]
    """Number of UTF-8 bytes of each completion, after truncation and without special tokens."""
    truncated: int
    """Number of rows that were truncated to the maximum length."""
    emptied: int
    """Number of rows that have no completion token left after truncation."""


@torch.no_grad()
def completion_losses(
    policy: Policy, rows: Sequence[dict[str, Any]], *, max_length: int, batch_size: int = 8
) -> CompletionLosses:
    """Return the negative log-likelihood of each row's completion.

    Args:
        policy: The model.
        rows: Canonical SFT rows. In plain text, all tokens except the first are the completion.
        max_length: Maximum number of tokens of a row; longer rows are truncated. A row has no
            completion tokens if its prompt has at least this length, or if `encode_example` drops
            it. The log reports the numbers of truncated, dropped and changed rows.
        batch_size: Number of rows in one forward pass.
    """
    whole, changes = _encode_and_count_omissions(policy, rows)
    truncated = [any(mask[:max_length]) for ids, mask in whole if len(ids) > max_length]
    changes["truncated"] = len(truncated)
    if summary := ", ".join(f"{count:,} {what}" for what, count in changes.items() if count):
        log.info("text: %s", summary)
    encoded = [(ids[:max_length], mask[:max_length]) for ids, mask in whole]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    nats = [0.0] * len(rows)
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        losses = _batch_losses(policy, [encoded[i] for i in indices])
        for index, loss in zip(indices, losses, strict=True):
            nats[index] = loss
    sizes = []
    for ids, mask in encoded:
        completion = [token for token, is_action in zip(ids, mask, strict=True) if is_action]
        text = policy.tokenizer.decode(completion, skip_special_tokens=True)
        sizes.append(len(text.encode()))
    counts = [sum(mask) for _, mask in encoded]
    return CompletionLosses(nats, counts, sizes, len(truncated), truncated.count(False))


def _batch_losses(policy: Policy, examples: Sequence[Example]) -> list[float]:
    """Return the negative log-likelihood of each example's completion, summed over its tokens.

    All examples are scored in one padded batch.
    """
    ids = [torch.tensor(ids) for ids, _ in examples]
    masks = [torch.tensor(mask) for _, mask in examples]
    pad_id = policy.tokenizer.pad_token_id
    tokens = pad_sequence(ids, batch_first=True, padding_value=pad_id).to(policy.device)
    attention = pad_sequence([torch.ones_like(mask) for mask in masks], batch_first=True)
    actions = pad_sequence(masks, batch_first=True)
    scored = policy.score(tokens, attention.to(policy.device), actions.to(policy.device))
    return [-float(row.sum()) for row in scored.logprobs]


def _encode_and_count_omissions(
    policy: Policy, rows: Sequence[dict[str, Any]]
) -> tuple[list[Example], Counter[str]]:
    """Return one example for each row, and reason -> number of omitted or changed rows.

    A row that cannot be encoded becomes an example of one padding token without completion tokens.
    """
    chat_format = ChatFormat(policy.tokenizer, stop_ids=generation_stop_ids(policy.model))
    encoded, changes = [], Counter()
    for row in rows:
        notes: Counter[str] = Counter()
        try:
            if "text" in row:
                ids, mask = encode_text_and_loss_mask(policy.tokenizer, row["text"])
            else:
                prompt, completion = prompt_with_tools(row), row["completion"]
                ids, mask = encode_example(chat_format, prompt, completion, notes=notes)
        except RowDropped as reason:
            changes[f"left out: {reason}"] += 1
            ids, mask = [policy.tokenizer.pad_token_id], [False]
        changes += Counter({what: 1 for what in notes})
        encoded.append((ids, mask))
    return encoded, changes
