"""Estimators of KL(policy || reference) for each token.

All tensors are [B, T] unless stated otherwise; index t describes token t. `mask` is True for
sampled tokens. Entries outside the mask may have any value, including nan.
"""

import torch
from torch import Tensor

from rlhf.algorithms.components import kl_estimator, registered_components


@kl_estimator("k1", "log ratio", differentiable=False)
def k1(log_ratio: Tensor) -> Tensor:
    """Return x = log pi - log ref, an unbiased estimate; as a loss, its expected gradient is 0."""
    return log_ratio


@kl_estimator("k2", "half the squared log ratio")
def k2(log_ratio: Tensor) -> Tensor:
    """Return x^2 / 2 with x = log pi - log ref, a biased estimate.

    As a loss, its expected gradient is the gradient of the token's KL(policy || reference).
    """
    return 0.5 * log_ratio.square()


@kl_estimator("k3", "log ratio with a control variate")
def k3(log_ratio: Tensor) -> Tensor:
    """Return exp(-x) - 1 + x with x = log pi - log ref, an unbiased estimate.

    As a loss, its expected gradient is the gradient of KL(reference || policy).
    """
    return torch.expm1(-log_ratio) + log_ratio


def masked_difference(left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """Return left - right inside `mask` and 0 outside; entries outside `mask` get no gradient."""
    return torch.where(mask, left, 0.0) - torch.where(mask, right, 0.0)


@torch.no_grad()
def approx_kl(log_ratio: Tensor) -> Tensor:
    """Return the k3 estimate r - 1 - log r of KL(old || new) for each token, in nats.

    Args:
        log_ratio: [B, T], log r = log pi_new - log pi_old.
    """
    return k3(-log_ratio)


@torch.no_grad()
def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of k1 over the tokens of each episode, [B], in nats.

    This sum is an unbiased estimate of the KL of the episode's distribution. The KL controllers use
    the mean over episodes.
    """
    return masked_difference(logprobs, ref_logprobs, mask).sum(dim=1)


def kl_estimate_per_token(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: str
) -> Tensor:
    """Estimate KL(policy || reference) at each sampled token, in nats.

    Outside `mask`, k1, k2 and k3 give 0. These estimators are described in Schulman, "Approximating
    KL divergence", 2020. If the estimate is subtracted from the reward, only k1 gives the policy
    gradient of the KL.

    Args:
        logprobs: [B, T], log-probabilities of the tokens under the policy.
        ref_logprobs: [B, T], log-probabilities under the reference policy.
        mask: [B, T], True for sampled tokens.
        estimator: Name of a registered estimator.

    Raises:
        ValueError: No estimator has this name.
    """
    table = registered_components("kl")
    if estimator not in table:
        *names, last = table
        raise ValueError(f"kl_estimator must be {', '.join(names)} or {last}, got {estimator!r}")
    return table[estimator].function(masked_difference(logprobs, ref_logprobs, mask))
