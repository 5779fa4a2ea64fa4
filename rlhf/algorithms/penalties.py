"""Penalties on the scores of whole episodes, in reward units."""

import torch
from torch import Tensor


def missing_eos(scores: Tensor, stopped: Tensor, *, penalty: float) -> Tensor:
    """Subtract `penalty` from the scores of episodes whose last reply has no stop token.

    This is the "EOS trick" of Huang et al. 2024 (The N+ Implementation Details of RLHF with PPO),
    with an additive penalty.

    Args:
        scores: [B].
        stopped: [B] bool, whether the stop token was sampled.
        penalty: Positive, in units of the scores.

    Returns:
        [B].
    """
    return torch.where(stopped, scores, scores - penalty)


def soft_overlong(lengths: Tensor, *, max_tokens: int, fraction: float) -> Tensor:
    """Return DAPO's soft overlong penalty (Yu et al. 2025, section 3.4), between -1 and 0.

    The penalty is 0 up to (1 - `fraction`) `max_tokens` sampled tokens, falls linearly, and is -1
    from `max_tokens` on. DAPO uses the last 4096 of 20480 tokens: fraction 0.2.

    Args:
        lengths: [B], number of sampled tokens of the longest turn.
        max_tokens: Limit of the tokens of a turn.
        fraction: Share of `max_tokens` in which the penalty grows; 0 disables the penalty.

    Returns:
        [B].
    """
    if not fraction:
        return torch.zeros(lengths.shape, device=lengths.device)
    buffer = fraction * max_tokens
    over = lengths.to(torch.get_default_dtype()) - (max_tokens - buffer)
    return -(over / buffer).clamp(0.0, 1.0)
