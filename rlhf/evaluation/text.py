"""Loss of a model on held-out completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.models.heads import Policy
from rlhf.rollout.plain_text import encode_text
from rlhf.rollout.tokens import TurnFormat, encode_example


@torch.no_grad()
def completion_losses(
    policy: Policy, rows: Sequence[dict[str, Any]], *, max_length: int, batch_size: int = 8
) -> tuple[list[float], list[int], list[int]]:
    """Summed negative log-likelihood (nats), tokens and UTF-8 bytes of each row's completion.

    Args:
        policy: the model.
        rows: canonical SFT rows; of plain text every token but the first counts.
        max_length: tokens of one example; the rest is cut. Rows whose prompt alone fills it have 0
            tokens. The bytes are those of the tokens that are left.
        batch_size: examples that go through the model at once.
    """
    decode = policy.tokenizer.decode
    layout = TurnFormat(policy.tokenizer)
    encoded = [
        encode_text(policy.tokenizer, row["text"])
        if "text" in row
        else encode_example(layout, row["prompt"], row["completion"])
        for row in rows
    ]
    encoded = [(ids[:max_length], own[:max_length]) for ids, own in encoded]
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
