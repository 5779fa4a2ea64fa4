"""Draw tokens from logits: temperature, truncation (top-k, top-p, min-p) and inversion sampling.

Truncation is for evaluation and generation only. In training it would bias the importance ratio,
because the trainer computes log-probabilities under the whole distribution.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from rlhf.rollout.sampling.base import SamplingParams

# Number of tokens per block. The probabilities of each block are summed first, because a cumulative
# sum over the whole vocabulary is slow.
SUM_BLOCK = 256


def sample_tokens_and_logprobs(
    logits: torch.Tensor,
    random_numbers: torch.Tensor,
    sampling: SamplingParams,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample tokens by inversion of the cumulative distribution.

    Args:
        logits: [n, V].
        random_numbers: Uniform random numbers in [0, 1), [n]; not used at temperature 0.
        sampling: Temperature and truncation. Probabilities are normalized after truncation.

    Returns:
        Tokens [n] and their log-probabilities [n] in nats. At temperature 0, these are the most
        likely tokens and their log-probabilities at temperature 1.
    """
    logits = _scaled_and_truncated_logits(logits, sampling)
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    blocks = nn.functional.pad(weights, (0, -weights.shape[-1] % SUM_BLOCK)).unflatten(
        -1, (-1, SUM_BLOCK)
    )
    sums = blocks.sum(-1).cumsum(-1)
    total = sums[:, -1:].contiguous()
    if sampling.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        target = random_numbers[:, None].to(sums.dtype) * total
        block = _interval_index(sums, target)
        before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
        inner = blocks[torch.arange(len(block), device=block.device), block[:, 0]].cumsum(-1)
        tokens = block * SUM_BLOCK + _interval_index(inner, target - before)
    logprobs = logits.gather(-1, tokens) - top - total.log()
    return tokens[:, 0], logprobs[:, 0]


def most_likely_tokens(
    logits: torch.Tensor, sampling: SamplingParams, count: int
) -> list[list[tuple[int, float]]]:
    """Return the most likely tokens with their log-probabilities, which are those of sampling.

    Args:
        logits: [n, V].
        sampling: Temperature and truncation, see `sample_tokens_and_logprobs`.
        count: Number of tokens for each row. Excluded tokens are omitted.
    """
    logprobs = _scaled_and_truncated_logits(logits, sampling).log_softmax(-1)
    values, tokens = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    rows = zip(tokens.tolist(), values.double().tolist(), strict=True)
    return [
        [pair for pair in zip(ids, row, strict=True) if math.isfinite(pair[1])] for ids, row in rows
    ]


def _scaled_and_truncated_logits(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Return the logits [n, V] of the distribution of sampling, in float32 or a wider type."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    return truncated_logits(logits, sampling) if sampling.truncates else logits


def _interval_index(cumulative: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the index [n, 1] of the interval of a cumulative sum [n, K] that contains each number.

    Because of rounding, a number [n, 1] can reach the total. It is then assigned to the last
    non-empty interval.
    """
    end = cumulative[:, -1:].contiguous()
    return torch.minimum(
        torch.searchsorted(cumulative, numbers, right=True), torch.searchsorted(cumulative, end)
    )


def truncated_logits(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Return logits [n, V] with -inf for the tokens that top-k, top-p or min-p excludes.

    Each rule is applied to the whole distribution. A token is kept if every rule keeps it. The most
    likely token is always kept.

    Args:
        logits: Logits [n, V], already divided by the temperature.
        sampling: Parameters ``top_k``, ``top_p`` (nucleus sampling, Holtzman et al. 2020) and
            ``min_p`` (Nguyen et al. 2024). Other parameters are not used.
    """
    kept = torch.ones_like(logits, dtype=torch.bool)
    if 0 < sampling.top_k < logits.shape[-1]:
        kept &= logits >= logits.topk(sampling.top_k, dim=-1).values[:, -1:]
    if sampling.top_p < 1:
        order = logits.argsort(dim=-1, descending=True, stable=True)
        sorted_probability = logits.softmax(-1).gather(-1, order)
        before = sorted_probability.cumsum(-1) - sorted_probability
        kept &= torch.zeros_like(kept).scatter(-1, order, before < sampling.top_p)
    if sampling.min_p > 0:
        gap = logits - logits.amax(-1, keepdim=True)
        kept &= gap.exp() >= sampling.min_p
    return torch.where(kept, logits, -torch.inf)
