"""Corrections for the difference between the policy that sampled the rollouts and the trained one.

All tensors are [B, T] unless stated otherwise; index t describes token t. Entries outside the masks
may have any value, nan included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.kl import masked_difference
from rlhf.algorithms.settings import Settings


@torch.no_grad()
def old_to_sampler_log_ratio(batch: TrainingBatch, mask: Tensor) -> Tensor:
    """Return log(pi_old / pi_sampler) of each token inside `mask`, [B, T]; it is 0 outside.

    pi_sampler is the policy that sampled the token (the behavior policy). pi_old is the policy at
    the start of the update, to which the clipped ratio of the losses refers (the proximal policy of
    Hilton et al. 2021, arXiv:2110.00641). The two policies differ by rounding errors and, if
    rollouts are collected asynchronously, by the updates since the token was sampled.
    """
    return masked_difference(batch.require("old_logprobs"), batch.require("sampler_logprobs"), mask)


@torch.no_grad()
def truncated_importance_weights(log_ratio: Tensor, *, cap: float) -> Tensor:
    """Return the weight min(pi_old / pi_sampler, cap) of each token, [B, T].

    The weight corrects the advantage of a token for the difference between the two policies, and
    the cap limits the variance of the weight (truncated importance sampling, Ionides 2008). Yao et
    al. 2025 use this weight with a cap of 2. The weight of a token ignores the different
    probability of reaching its state, so the correction of episodes with several tokens is not
    exact.

    Args:
        log_ratio: Result of `old_to_sampler_log_ratio`, [B, T].
        cap: Upper bound of the weight.
    """
    return log_ratio.exp().clamp(max=cap)


@torch.no_grad()
def is_mean_ratio_in_band(log_ratio: Tensor, mask: Tensor, settings: Settings) -> Tensor:
    """Return whether the geometric mean ratio of each episode is in the band, [B].

    The geometric mean exp(mean_t log(pi_old / pi_sampler)) does not depend on the length of the
    episode. Episodes outside [`sequence_mask_low`, `sequence_mask_high`] are excluded from the
    losses and from their denominators (Liu, Li et al. 2025, "When Speed Kills Stability", part 3,
    "geometric-level rejection sampling"). They remain in the baselines.

    Args:
        log_ratio: Result of `old_to_sampler_log_ratio`, [B, T].
        mask: [B, T], True for the tokens of the mean. An episode without tokens is in the band.
        settings: The band; a bound of 0 is not applied.
    """
    length = mask.sum(dim=1).clamp(min=1)
    ratio = (torch.where(mask, log_ratio, 0.0).sum(dim=1) / length).exp()
    inside = ratio >= settings.sequence_mask_low
    if settings.sequence_mask_high:
        inside &= ratio <= settings.sequence_mask_high
    return inside


@torch.no_grad()
def off_policy_metrics(batch: TrainingBatch, settings: Settings) -> dict[str, float]:
    """Return metrics of the importance weights of the tokens of scored episodes.

    They are the mean of the weights w, their effective sample size as a fraction of the number N of
    tokens, (sum w)^2 / (N sum w^2) (Kish 1965), and, if there is a sequence mask, the fraction of
    scored episodes that it excludes. Without `tis_cap`, the weights are not truncated. The result
    is empty if no episode has a score.
    """
    scored = ~batch.scores().isnan()
    mask = batch.action_mask & scored[:, None]
    if not mask.any():
        return {}
    log_ratio = old_to_sampler_log_ratio(batch, mask)
    weights = truncated_importance_weights(log_ratio, cap=settings.tis_cap or math.inf)
    weights = weights[mask].double()
    metrics = {
        "sampler/weight_mean": float(weights.mean()),
        "sampler/ess": float(weights.sum().square() / (len(weights) * weights.square().sum())),
    }
    if settings.masks_sequences:
        inside = is_mean_ratio_in_band(log_ratio, mask, settings)[scored]
        metrics["sampler/masked"] = 1 - float(inside.double().mean())
    return metrics
