"""Loss of a model on held-out completions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from rlhf.data.conversation import RowDropped
from rlhf.models.heads import Policy
from rlhf.rollout.chat_format import (
    ChatFormat,
    conversation_of,
    encode_example,
    generation_stop_ids,
)
from rlhf.rollout.plain_text import encode_text

log = logging.getLogger(__name__)


def truncated_examples(
    policy: Policy, rows: Sequence[dict[str, Any]], *, max_length: int
) -> tuple[int, int]:
    """Rows that `completion_losses` cuts, and those among them of which nothing is left."""
    encoded, _changed = _encode(policy, rows)
    cut = [any(own[:max_length]) for ids, own in encoded if len(ids) > max_length]
    return len(cut), cut.count(False)


@torch.no_grad()
def completion_losses(
    policy: Policy, rows: Sequence[dict[str, Any]], *, max_length: int, batch_size: int = 8
) -> tuple[list[float], list[int], list[int]]:
    """Summed negative log-likelihood (nats), tokens and UTF-8 bytes of each row's completion.

    Args:
        policy: the model.
        rows: canonical SFT rows; of plain text every token but the first counts.
        max_length: tokens of one example; the rest is cut. Rows whose prompt alone fills it have 0
            tokens, and so have rows that the chat template refuses; both are counted in the log.
            The bytes are those of the tokens that are left.
        batch_size: examples that go through the model at once.
    """
    decode = policy.tokenizer.decode
    whole, changed = _encode(policy, rows)
    changed["truncated"] = sum(len(ids) > max_length for ids, _ in whole)
    if told := ", ".join(f"{count:,} {what}" for what, count in changed.items() if count):
        log.info("text: %s", told)
    encoded = [(ids[:max_length], own[:max_length]) for ids, own in whole]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    losses, counts = [0.0] * len(rows), [0] * len(rows)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        width = max(len(encoded[i][0]) for i in chosen)
        tokens = torch.full((len(chosen), width), policy.tokenizer.pad_token_id)
        attention = torch.zeros((len(chosen), width), dtype=torch.bool)
        actions = torch.zeros((len(chosen), width), dtype=torch.bool)
        for place, index in enumerate(chosen):
            ids, own = encoded[index]
            tokens[place, : len(ids)] = torch.tensor(ids)
            attention[place, : len(ids)] = True
            actions[place, : len(ids)] = torch.tensor(own)
        device = policy.device
        scored = policy.score(tokens.to(device), attention.to(device), actions.to(device))
        for place, index in enumerate(chosen):
            losses[index] = -float(scored.logprobs[place].sum())
            counts[index] = int(actions[place].sum())
    sizes = []
    for ids, own in encoded:
        said = [token for token, mine in zip(ids, own, strict=True) if mine]
        sizes.append(len(decode(said, skip_special_tokens=True).encode()))
    return losses, counts, sizes


def _encode(
    policy: Policy, rows: Sequence[dict[str, Any]]
) -> tuple[list[tuple[list[int], list[bool]]], Counter[str]]:
    """Ids of each row and which of them count, and what was left out or changed, by reason.

    A row that cannot be encoded counts no token.
    """
    chat_format = ChatFormat(policy.tokenizer, stop_ids=generation_stop_ids(policy.model))
    encoded, changed = [], Counter()
    for row in rows:
        notes: Counter[str] = Counter()
        try:
            if "text" in row:
                ids, own = encode_text(policy.tokenizer, row["text"])
            else:
                ids, own = encode_example(chat_format, *conversation_of(row), notes=notes)
        except RowDropped as reason:
            changed[f"left out: {reason}"] += 1
            ids, own = [policy.tokenizer.pad_token_id], [False]
        changed += Counter({what: 1 for what in notes})
        encoded.append((ids, own))
    return encoded, changed
