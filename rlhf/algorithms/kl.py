"""Divergence from a reference policy, and how losses over tokens add up.

All tensors are [B, T]; index t describes token t; `mask` is True on sampled tokens. Slots outside
it may hold anything, nan included.
"""

import torch
from torch import Tensor

from rlhf.algorithms.metrics import MetricSums, masked_mean

Denominator = float | Tensor


def aggregate(
    per_token: Tensor, mask: Tensor, *, aggregation: str, denominator: Denominator
) -> Tensor:
    """Add up a loss over the sampled tokens.

    Args:
        per_token: the loss of each token.
        mask: sampled tokens.
        aggregation: "token" and "constant" weigh every token alike (with the number of tokens in
            the global mini-batch as denominator, or sequences times a fixed length as in Dr. GRPO);
            "sequence" takes each sequence's mean first (denominator: number of sequences), which
            weighs the tokens of short replies more.
        denominator: of the global mini-batch.
    """
    total = torch.where(mask, per_token, 0.0).sum(dim=1)
    if aggregation == "sequence":
        total = total / mask.sum(dim=1).clamp(min=1)
    return total.sum() / denominator


def difference(left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """left - right where `mask`, else 0; neither values nor gradients of other slots leak."""
    return torch.where(mask, left, 0.0) - torch.where(mask, right, 0.0)


@torch.no_grad()
def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Unbiased estimate of each episode's KL(policy || reference) in nats, [B]: the sum of k1.

    Its mean over episodes is what the KL controllers steer.
    """
    return difference(logprobs, ref_logprobs, mask).sum(dim=1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: str) -> Tensor:
    """Estimate of KL(policy || reference) from each sampled token, in nats; 0 outside `mask`.

    With x = log pi - log ref: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x (Schulman, "Approximating
    KL divergence", 2020). For tokens sampled from the policy k1 and k3 are unbiased values. As a
    loss only k2 has the gradient of KL(policy || reference) (for the token's own state); that of k1
    is 0 in expectation, and that of k3 belongs to KL(reference || policy). In the reward only k1
    gives the gradient of the divergence.
    """
    x = difference(logprobs, ref_logprobs, mask)
    if estimator == "k1":
        return x
    if estimator == "k2":
        return 0.5 * x.square()
    if estimator == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"kl_estimator must be k1, k2 or k3, got {estimator!r}")


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    denominator: Denominator,
    aggregation: str,
    estimator: str,
) -> tuple[Tensor, MetricSums]:
    """The divergence from the reference as a loss (GRPO, Shao et al. 2024, eq. 3 and 4)."""
    estimate = kl_estimate(logprobs, ref_logprobs, mask, estimator=estimator)
    loss = aggregate(estimate, mask, aggregation=aggregation, denominator=denominator)
    return loss, MetricSums(means={"policy/kl_in_loss": masked_mean(estimate, mask)})
