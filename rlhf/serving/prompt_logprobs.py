"""Compute the log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from rlhf.models.fast.packing import flat_states_and_token_index
from rlhf.models.output_head import logits_of
from rlhf.rollout.sampling.base import NewTokens

LOGIT_ROWS = 256
"""Number of positions whose logits are computed together. It limits the memory for logits."""


@torch.no_grad()
def prompt_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], *, num_alternatives: int
) -> list[NewTokens]:
    """Return the log-probabilities of the tokens of prompts at temperature 1.

    Args:
        model: Causal model.
        prompts: Token ids of each prompt; no prompt is empty.
        num_alternatives: Number of most likely tokens to return at each position.

    Returns:
        For each prompt, the tokens from the second one on, because the first token has no
        log-probability.
    """
    rows = [torch.tensor(ids) for ids in prompts]
    tokens = pad_sequence(rows, batch_first=True).to(model.device)
    mask = pad_sequence([torch.ones(len(ids), dtype=torch.bool) for ids in prompts], True)
    hidden, index = flat_states_and_token_index(model, tokens, mask.to(model.device))
    return [
        _logprobs_after_hidden_states(
            model, hidden[positions[: len(ids) - 1]], ids[1:], num_alternatives
        )
        for ids, positions in zip(prompts, index, strict=True)
    ]


def _logprobs_after_hidden_states(
    model: Any, hidden: torch.Tensor, tokens: Sequence[int], num_alternatives: int
) -> NewTokens:
    """Return the log-probabilities of tokens [T] after hidden states [T, D]."""
    result = NewTokens(list(tokens), [], [])
    for start in range(0, len(tokens), LOGIT_ROWS):
        logits = logits_of(model, hidden[start : start + LOGIT_ROWS])
        ids = torch.tensor(tokens[start : start + LOGIT_ROWS], device=logits.device)
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        result.logprobs.extend(scores.gather(-1, ids[:, None])[:, 0].double().tolist())
        if num_alternatives:
            values, likely = scores.topk(min(num_alternatives, scores.shape[-1]), dim=-1)
            result.alternatives.extend(
                list(zip(row, numbers, strict=True))
                for row, numbers in zip(likely.tolist(), values.double().tolist(), strict=True)
            )
    return result
