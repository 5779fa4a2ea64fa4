"""Penalties on the scores of whole episodes, in reward units."""

import torch
from torch import Tensor


def subtract_missing_eos_penalty(scores: Tensor, stopped: Tensor, *, penalty: float) -> Tensor:
    """Subtract `penalty` from the scores of episodes whose last reply has no stop token.

    This is the "EOS trick" of Huang et al. 2024 (The N+ Implementation Details of RLHF with PPO),
    with a constant that is subtracted.

    Args:
        scores: [B] scores of the episodes.
        stopped: [B] bool, whether the last reply ends with a stop token.
        penalty: Number to subtract, in units of the scores.

    Returns:
        [B] scores.
    """
    return torch.where(stopped, scores, scores - penalty)


def soft_overlong_penalty(lengths: Tensor, *, max_tokens: int, fraction: float) -> Tensor:
    """Return DAPO's soft overlong penalty (Yu et al. 2025, section 3.4), between -1 and 0.

    The penalty is 0 up to (1 - `fraction`) `max_tokens` sampled tokens, then decreases linearly,
    and is -1 from `max_tokens` on. DAPO's fraction is 0.2 (the last 4096 of 20480 tokens).

    Args:
        lengths: [B], number of sampled tokens of the longest turn of each episode.
        max_tokens: Maximum number of sampled tokens of a turn.
        fraction: Length of the range in which the penalty decreases, as a fraction of
            `max_tokens`. If it is 0, all penalties are 0.

    Returns:
        [B] penalties in reward units, which the caller adds to the scores.
    """
    if not fraction:
        return torch.zeros(lengths.shape, device=lengths.device)
    buffer = fraction * max_tokens
    over = lengths.to(torch.get_default_dtype()) - (max_tokens - buffer)
    return -(over / buffer).clamp(0.0, 1.0)
