"""Policy losses, value loss and entropy bonus.

All tensors are [B, T] unless said otherwise; index t describes token t; `mask` is True on sampled
tokens. Slots outside it may hold anything, nan included: neither values nor gradients leak. The
caller supplies the denominator of the *global* mini-batch, so losses and metrics of micro-batches
add up: every function returns a scalar and a `MetricSums`.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algorithms.kl import Denominator, aggregate, difference
from rlhf.algorithms.metrics import MetricSums, masked_mean


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    denominator: Denominator,
    aggregation: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> tuple[Tensor, MetricSums]:
    """Clipped surrogate with one ratio per token (PPO, Schulman et al. 2017, eq. 7).

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). Separate bounds are DAPO's "clip higher" (Yu
    et al. 2025). `dual_clip` c > 1 bounds the loss where A < 0 at -c A (Ye et al. 2020); 0
    turns it off.
    """
    log_ratio = difference(logprobs, old_logprobs, mask)
    return _clipped_surrogate(
        log_ratio,
        log_ratio,
        advantages,
        mask,
        bounds=(clip_low, clip_high, dual_clip),
        aggregation=aggregation,
        denominator=denominator,
    )


def sequence_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    denominator: Denominator,
    aggregation: str,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, MetricSums]:
    """Clipped surrogate with one ratio per sequence (GSPO, Zheng et al. 2025, section 4).

    The ratio s = (pi / pi_old)^(1 / length) is the exponential of the mean log-ratio. This is the
    paper's GSPO-token: each token has the value s and the gradient s grad log pi of its own. With
    equal advantages over a sequence value and gradient are those of GSPO; with different ones
    (turns, return to go) each token still gets its own credit.
    """
    log_ratio = difference(logprobs, old_logprobs, mask)
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)
    of_sequence = log_ratio.detach().sum(dim=1, keepdim=True) / length
    return _clipped_surrogate(
        of_sequence + log_ratio - log_ratio.detach(),
        log_ratio,
        advantages,
        mask,
        bounds=(clip_low, clip_high, 0.0),
        aggregation=aggregation,
        denominator=denominator,
    )


def _clipped_surrogate(
    log_weight: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bounds: tuple[float, float, float],
    aggregation: str,
    denominator: Denominator,
) -> tuple[Tensor, MetricSums]:
    clip_low, clip_high, dual_clip = bounds
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_weight.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip:
        floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
        surrogate = torch.maximum(surrogate, floor)
    loss = aggregate(-surrogate, mask, aggregation=aggregation, denominator=denominator)
    return loss, _ratio_tally(loss, log_ratio, ratio, ratio != clipped, mask)


def clipped_weight_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    denominator: Denominator,
    aggregation: str,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, MetricSums]:
    """Log-likelihood weighted by advantage and a clipped constant (CISPO, MiniMax 2025).

    -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi: unlike PPO's, a clipped token keeps its
    gradient.
    """
    log_ratio = difference(logprobs, old_logprobs, mask)
    ratio = log_ratio.detach().exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    advantages = torch.where(mask, advantages, 0.0)
    per_token = -clipped * advantages * torch.where(mask, logprobs, 0.0)
    loss = aggregate(per_token, mask, aggregation=aggregation, denominator=denominator)
    return loss, _ratio_tally(loss, log_ratio, ratio, ratio != clipped, mask)


def likelihood_loss(
    logprobs: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    denominator: Denominator,
    aggregation: str,
) -> tuple[Tensor, MetricSums]:
    """Weighted negative log-likelihood: REINFORCE with advantages as weights (Williams 1992), or
    best-of-n distillation with 1 for each group's best (RAFT, Dong et al. 2023)."""
    per_token = -torch.where(mask, weights, 0.0) * torch.where(mask, logprobs, 0.0)
    loss = aggregate(per_token, mask, aggregation=aggregation, denominator=denominator)
    return loss, MetricSums(sums={"policy/loss": loss.detach()})


def pairwise_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    differences: Tensor,
    units: Tensor,
    mask: Tensor,
    *,
    denominator: Denominator,
    beta: float,
    pair_labels: str,
) -> tuple[Tensor, MetricSums]:
    """Online DPO on pairs of sequences (Rafailov et al. 2023, eq. 7; Guo et al. 2024).

    Args:
        logprobs: of the policy.
        ref_logprobs: of the reference.
        differences: [B], score minus the partner's score.
        units: [B] integers; the two rows of a pair share one. Rows of one pair must be together.
        mask: sampled tokens; a row without any is in no pair.
        denominator: number of pairs in the global mini-batch.
        beta: weight of the divergence, reward per nat.
        pair_labels: "soft": the better row is preferred with probability sigma(difference), its
            exact expectation under Bradley-Terry labels; "hard": always.
    """
    paired = mask.any(dim=1)
    log_ratio = difference(logprobs, ref_logprobs, mask).sum(dim=1)
    better = paired & (differences > 0)
    signed = torch.where(better, log_ratio, torch.where(paired, -log_ratio, 0.0))
    _, index = torch.unique(units, return_inverse=True)
    margins = torch.zeros_like(signed).index_add(0, index, beta * signed)[index]
    preferred = torch.where(better, differences, 0.0).sigmoid()
    if pair_labels == "hard":
        preferred = torch.ones_like(preferred)
    per_pair = -preferred * logsigmoid(margins) - (1 - preferred) * logsigmoid(-margins)
    loss = torch.where(better, per_pair, 0.0).sum() / denominator
    return loss, MetricSums(
        means={
            "policy/pair_accuracy": masked_mean((margins > 0).to(margins.dtype), better),
            "policy/pair_margin": masked_mean(margins, better),
        },
        sums={"policy/loss": loss.detach()},
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    denominator: Denominator,
    clip: float,
) -> tuple[Tensor, MetricSums]:
    """Half the squared error of the critic, summed over `mask` and divided by `denominator`.

    With `clip` > 0 the larger of the plain error and that of a value held within `clip` of the one
    at rollout (lm-human-preferences, `train_policy.py`); 0 turns clipping off.
    """
    values, returns = torch.where(mask, values, 0.0), torch.where(mask, returns, 0.0)
    error = (values - returns).square()
    held = torch.zeros_like(mask)
    if clip:
        old_values = torch.where(mask, old_values, 0.0)
        near = values.clamp(old_values - clip, old_values + clip)
        held = (near - returns).square() > error
        error = torch.maximum(error, (near - returns).square())
    loss = 0.5 * torch.where(mask, error, 0.0).sum() / denominator
    return loss, MetricSums(
        means={
            "critic/clip_fraction": masked_mean(held.to(values.dtype), mask),
            "critic/value": masked_mean(values, mask),
        },
        sums={"critic/loss": loss.detach()},
    )


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over `mask`: 1 for a perfect critic, 0 for a
    constant one, negative for a harmful one; nan where the returns do not vary."""
    residual, target = (returns - values)[mask], returns[mask]
    variance = target.var(correction=0) if target.numel() else target.new_zeros(())
    return float(1 - residual.var(correction=0) / variance) if variance > 0 else float("nan")


def entropy_bonus(
    entropy: Tensor, mask: Tensor, *, denominator: Denominator, aggregation: str
) -> tuple[Tensor, MetricSums]:
    """Entropy of the distributions the sampled tokens were drawn from, in nats."""
    bonus = aggregate(entropy, mask, aggregation=aggregation, denominator=denominator)
    return bonus, MetricSums(means={"policy/entropy": masked_mean(entropy, mask)})


def _ratio_tally(
    loss: Tensor, log_ratio: Tensor, ratio: Tensor, clipped: Tensor, mask: Tensor
) -> MetricSums:
    """How far the policy has moved from the one that made the rollouts."""
    x = log_ratio.detach()
    ratio = torch.where(mask, ratio.detach(), 1.0)
    return MetricSums(
        means={
            "policy/clip_fraction": masked_mean(clipped.to(ratio.dtype), mask),
            "policy/drift": masked_mean(torch.expm1(x) - x, mask),
        },
        sums={"policy/loss": loss.detach()},
        maxima={"policy/ratio_max": ratio.amax() if ratio.numel() else ratio.new_ones(())},
    )
