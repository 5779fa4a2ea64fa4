"""Leaving unlikely tokens out of a draw: top-k, top-p, min-p.

For evaluation and generation. In training it would bias the importance ratio: the trainer scores
tokens under the whole distribution, and those left out could never have been sampled.
"""

from __future__ import annotations

import torch

from rlhf.config.rollout import RolloutSpec


def truncate(logits: torch.Tensor, spec: RolloutSpec) -> torch.Tensor:
    """Logits [n, V] at the sampling temperature, with -inf where a token is left out.

    The likeliest token always stays. Each rule looks at the whole distribution; a token stays if
    all of them keep it.

    Args:
        logits: already divided by the temperature.
        spec: its ``top_k``; ``top_p`` (Holtzman et al. 2020: the smallest set of likeliest tokens
            whose probability reaches it); ``min_p`` (Nguyen et al. 2024: a fraction of the
            likeliest token's probability).
    """
    kept = torch.ones_like(logits, dtype=torch.bool)
    if 0 < spec.top_k < logits.shape[-1]:
        kept &= logits >= logits.topk(spec.top_k, dim=-1).values[:, -1:]
    if spec.top_p < 1:
        order = logits.argsort(dim=-1, descending=True, stable=True)
        sorted_probability = logits.softmax(-1).gather(-1, order)
        before = sorted_probability.cumsum(-1) - sorted_probability
        kept &= torch.zeros_like(kept).scatter(-1, order, before < spec.top_p)
    if spec.min_p > 0:
        gap = logits - logits.amax(-1, keepdim=True)
        kept &= gap.exp() >= spec.min_p
    return torch.where(kept, logits, -torch.inf)
