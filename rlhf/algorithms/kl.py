"""KL to the reference policy, and how losses over tokens are aggregated.

All tensors are [B, T]; index t describes token t; `mask` is True on sampled tokens. Slots outside
it may hold any value, nan included.
"""

import torch
from torch import Tensor

from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.components import components, kl_estimator
from rlhf.algorithms.metrics import MetricSums, masked_mean
from rlhf.algorithms.settings import Settings

Denominator = float | Tensor


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


def aggregate(
    per_token: Tensor, mask: Tensor, *, aggregation: str, denominator: Denominator
) -> Tensor:
    """Sum a loss over the sampled tokens.

    Args:
        per_token: loss of each token.
        mask: sampled tokens.
        aggregation: "token" and "constant" weigh every token alike (the denominator is the number
            of tokens in the global mini-batch, or sequences times a fixed length as in Dr. GRPO);
            "sequence" takes the mean of each sequence first (the denominator is the number of
            sequences), which gives the tokens of short completions more weight.
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

    The KL controllers steer its mean over episodes.
    """
    return difference(logprobs, ref_logprobs, mask).sum(dim=1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: str) -> Tensor:
    """Estimate of KL(policy || reference) from each sampled token, in nats; 0 outside `mask`.

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


def kl_loss(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """KL to the reference as a loss (GRPO, Shao et al. 2024, eq. 3 and 4), without its weight."""
    mask = batch.require("loss_mask")
    estimate = kl_estimate(
        logprobs, batch.require("ref_logprobs"), mask, estimator=settings.kl_estimator
    )
    loss = aggregate(estimate, mask, aggregation=settings.aggregation, denominator=denominator)
    return loss, MetricSums(means={"policy/kl_in_loss": masked_mean(estimate, mask)})
