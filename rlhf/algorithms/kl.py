"""Estimates of the KL to the reference policy.

All tensors are [B, T]; index t describes token t; `mask` is True on sampled tokens. Slots outside
it may hold any value, nan included.
"""

import torch
from torch import Tensor

from rlhf.algorithms.components import components, kl_estimator


@kl_estimator("k1", "log ratio", differentiable=False)
def k1(log_ratio: Tensor) -> Tensor:
    """x = log pi - log ref. Unbiased; as a loss its gradient is 0 in expectation."""
    return log_ratio


@kl_estimator("k2", "half the squared log ratio")
def k2(log_ratio: Tensor) -> Tensor:
    """x^2 / 2. As a loss it has the gradient of KL(policy || reference) in the token's state."""
    return 0.5 * log_ratio.square()


@kl_estimator("k3", "log ratio with a control variate")
def k3(log_ratio: Tensor) -> Tensor:
    """exp(-x) - 1 + x. Unbiased; as a loss it has the gradient of KL(reference || policy)."""
    return torch.expm1(-log_ratio) + log_ratio


def difference(left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """Return left - right where `mask`, else 0; values and gradients of other slots do not leak."""
    return torch.where(mask, left, 0.0) - torch.where(mask, right, 0.0)


@torch.no_grad()
def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Estimate each episode's KL(policy || reference) in nats, [B], by the sum of k1: unbiased.

    The KL controllers steer its mean over episodes.
    """
    return difference(logprobs, ref_logprobs, mask).sum(dim=1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) from each sampled token, in nats; 0 outside `mask`.

    The estimators are those of Schulman, "Approximating KL divergence", 2020. In the reward only k1
    gives the gradient of the KL.

    Raises:
        ValueError: no estimator has this name.
    """
    table = components("kl")
    if estimator not in table:
        *names, last = table
        raise ValueError(f"kl_estimator must be {', '.join(names)} or {last}, got {estimator!r}")
    return table[estimator].function(difference(logprobs, ref_logprobs, mask))
