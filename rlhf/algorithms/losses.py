"""Policy losses, the value loss, and the total loss with the KL and the entropy bonus.

A policy loss is a decorated function of the new log-probabilities, a `TrainingBatch` and the
settings. `Algorithm.loss` is the name that is given to the decorator, such as "clipped". All
tensors are [B, T] unless stated otherwise; index t describes token t. Entries outside
`batch.loss_mask` may have any value, nan included, and affect neither values nor gradients. The
argument `denominator` is the denominator of the *global* mini-batch, so that losses and metrics can
be added over micro-batches. Every policy loss, `value_loss` and `compute_loss` return a scalar loss
and a `MetricSums`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.batch import TrainingBatch, dense_index
from rlhf.algorithms.components import policy_loss
from rlhf.algorithms.kl import approx_kl, kl_estimate_per_token, masked_difference
from rlhf.algorithms.metrics import MetricSums, masked_sum_and_count
from rlhf.algorithms.settings import Settings

Denominator = float | Tensor


def loss_denominator(algorithm: Algorithm, mask: Tensor, *, max_tokens: int) -> Tensor:
    """Return the denominator of the policy loss of a mini-batch, a scalar.

    Args:
        algorithm: The algorithm and its settings.
        mask: `loss_mask` of the whole mini-batch, which means of all processes.
        max_tokens: Maximum number of sampled tokens of an episode, for aggregation "constant".
    """
    sequences = mask.any(dim=1).sum()
    if algorithm.policy_loss.pairs:
        return sequences / 2
    return {
        "token": mask.sum(),
        "sequence": sequences,
        "constant": sequences * max_tokens,
    }[algorithm.settings.aggregation]


def compute_loss(
    algorithm: Algorithm,
    logprobs: Tensor,
    batch: TrainingBatch,
    *,
    denominator: Denominator,
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    values: Tensor | None = None,
    critic_denominator: Denominator | None = None,
    critic_only: bool = False,
) -> tuple[Tensor, MetricSums]:
    """Return the algorithm's loss (policy, KL, entropy bonus and critic) and its metrics.

    Args:
        algorithm: The algorithm and its settings.
        logprobs: Log-probabilities [B, T] of the tokens under the policy, with gradients.
        batch: A micro-batch, after `estimate_advantages`.
        denominator: Denominator of the global mini-batch, from `loss_denominator`; a denominator
            below 1 is replaced by 1.
        kl_coef: Current coefficient of the KL controller.
        entropy: Entropy [B, T] of the policy, for the entropy bonus and a metric. If None, both are
            omitted.
        values: Values [B, T] of the critic. If None, the loss of the critic is omitted.
        critic_denominator: Denominator of the critic's loss: the number of tokens in `loss_mask` of
            the global mini-batch. If None, the tokens of this micro-batch are counted.
        critic_only: Whether to return only the critic's loss, with the metrics of all terms. It has
            no effect if `values` is None.
    """
    settings = replace(algorithm.settings, kl_coef=kl_coef)
    denominator = torch.as_tensor(denominator, dtype=logprobs.dtype).clamp(min=1)
    mask = batch.require("loss_mask")

    def aggregated(per_token: Tensor) -> Tensor:
        return aggregate(per_token, mask, aggregation=settings.aggregation, denominator=denominator)

    loss_function = algorithm.policy_loss.function
    loss, metrics = loss_function(logprobs, batch, settings, denominator=denominator)
    value_metrics = MetricSums()
    terms: dict[str, Tensor] = {}
    if algorithm.kl_in_loss:  # GRPO, Shao et al. 2024, eq. 3 and 4
        reference = batch.require("ref_logprobs")
        kl = kl_estimate_per_token(logprobs, reference, mask, estimator=settings.kl_estimator)
        loss, terms["policy/kl_in_loss"] = loss + kl_coef * aggregated(kl), kl
    if "policy/approx_kl" not in metrics.means and batch.old_logprobs is not None:
        terms["policy/approx_kl"] = approx_kl(masked_difference(logprobs, batch.old_logprobs, mask))
    if entropy is not None:
        terms["policy/entropy"] = entropy
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * aggregated(entropy)
    if values is not None:
        count = mask.sum() if critic_denominator is None else critic_denominator
        count = torch.as_tensor(count, dtype=values.dtype).clamp(min=1)
        error, value_metrics = value_loss(values, batch, settings, denominator=count)
        error = settings.value_coef * error
        loss = error if critic_only else loss + error
    means = {name: masked_sum_and_count(term, mask) for name, term in terms.items()}
    return loss, metrics + MetricSums(means=means) + value_metrics


def aggregate(
    per_token: Tensor, mask: Tensor, *, aggregation: str, denominator: Denominator
) -> Tensor:
    """Return the sum of the token losses inside `mask`, divided by `denominator`.

    Args:
        per_token: Loss of each token.
        mask: True for the tokens of the sum.
        aggregation: With "token" and "constant", all tokens have the same weight. With "sequence",
            the mean over the tokens of each sequence is computed first, so the tokens of short
            sequences have more weight.
        denominator: Denominator of the global mini-batch, from `loss_denominator`. With "token" it
            is the number of tokens, and with "sequence" the number of sequences. With "constant"
            it is the number of sequences times a fixed length, as in Dr. GRPO.

    Returns:
        A scalar.
    """
    total = torch.where(mask, per_token, 0.0).sum(dim=1)
    if aggregation == "sequence":
        total = total / mask.sum(dim=1).clamp(min=1)
    return total.sum() / denominator


@policy_loss(
    "clipped",
    "clipped importance ratio per token",
    reads=(
        "clip_low",
        "clip_high",
        "dual_clip",
        "tis_cap",
        "sequence_mask_low",
        "sequence_mask_high",
        "aggregation",
        "entropy_coef",
    ),
)
def clipped_loss(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Compute the clipped surrogate with one ratio per token (PPO, Schulman et al. 2017, eq. 7).

    With importance ratio r and advantage A, the loss of a token is -min(r A, clip(r, 1 - clip_low,
    1 + clip_high) A). A `clip_high` above `clip_low` is DAPO's "clip higher" (Yu et al. 2025). If
    `dual_clip` = c > 1, the loss of a token with A < 0 is at most -c A (Ye et al. 2020).
    """
    mask = batch.require("loss_mask")
    log_ratio = masked_difference(logprobs, batch.require("old_logprobs"), mask)
    return _clipped_surrogate(
        log_ratio, log_ratio, batch, settings, settings.dual_clip, denominator=denominator
    )


@policy_loss(
    "clipped_sequence",
    "clipped importance ratio per sequence",
    reads=(
        "clip_low",
        "clip_high",
        "tis_cap",
        "sequence_mask_low",
        "sequence_mask_high",
        "aggregation",
        "entropy_coef",
    ),
)
def clipped_sequence_loss(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Compute the clipped surrogate with one ratio per sequence (GSPO, Zheng et al. 2025, sec. 4).

    The ratio s = (pi / pi_old)^(1 / length) is the exponential of the mean log-ratio of a sequence.
    The implementation is the paper's GSPO-token: the ratio of each token has the value s, and the
    gradient of this ratio is s times the gradient of the token's log-probability. If all tokens of
    a sequence have the same advantage and `aggregation` is "sequence", the loss and its gradient
    equal those of GSPO. The tokens may also have different advantages, as with the estimator
    `return_to_go`.
    """
    mask = batch.require("loss_mask")
    log_ratio = masked_difference(logprobs, batch.require("old_logprobs"), mask)
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)
    sequence_log_ratio = log_ratio.detach().sum(dim=1, keepdim=True) / length
    log_weight = sequence_log_ratio + log_ratio - log_ratio.detach()
    return _clipped_surrogate(log_weight, log_ratio, batch, settings, 0.0, denominator=denominator)


def _clipped_surrogate(
    log_weight: Tensor,
    log_ratio_for_metrics: Tensor,
    batch: TrainingBatch,
    settings: Settings,
    dual_clip: float,
    *,
    denominator: Denominator,
) -> tuple[Tensor, MetricSums]:
    """Return the clipped surrogate loss and its metrics.

    The importance ratio in the loss is exp(`log_weight`). The log-ratio of each token,
    `log_ratio_for_metrics`, is used only for the metric `policy/approx_kl`. `dual_clip` is the
    bound c of `clipped_loss`; 0 disables it.
    """
    mask = batch.require("loss_mask")
    advantages = torch.where(mask, batch.require("advantages"), 0.0)
    ratio = log_weight.exp()
    clipped_ratio = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    if dual_clip:
        floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
        surrogate = torch.maximum(surrogate, floor)
    loss = aggregate(-surrogate, mask, aggregation=settings.aggregation, denominator=denominator)
    return loss, _ratio_loss_metrics(
        loss, log_ratio_for_metrics, ratio, clipped_ratio, advantages, mask
    )


@policy_loss(
    "clipped_weight",
    "log-likelihood with a clipped and detached importance weight",
    reads=(
        "clip_low",
        "clip_high",
        "tis_cap",
        "sequence_mask_low",
        "sequence_mask_high",
        "aggregation",
        "entropy_coef",
    ),
)
def clipped_weight_likelihood_loss(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Compute the log-likelihood loss with clipped importance weights (CISPO, MiniMax 2025).

    With importance ratio r and advantage A, the loss of a token is -sg(clip(r, 1 - clip_low, 1 +
    clip_high)) A log pi, where sg is the stop-gradient operator. Unlike in PPO, the loss of a
    clipped token has a gradient.
    """
    mask = batch.require("loss_mask")
    log_ratio = masked_difference(logprobs, batch.require("old_logprobs"), mask)
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    advantages = torch.where(mask, batch.require("advantages"), 0.0)
    per_token = -weight * advantages * torch.where(mask, logprobs, 0.0)
    loss = aggregate(per_token, mask, aggregation=settings.aggregation, denominator=denominator)
    return loss, _ratio_loss_metrics(loss, log_ratio, ratio, weight, advantages, mask)


@policy_loss(
    "likelihood", "log-likelihood weighted by the advantage", reads=("aggregation", "entropy_coef")
)
def advantage_weighted_likelihood_loss(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Compute the negative log-likelihood weighted by the advantages.

    This is the loss of REINFORCE (Williams 1992). With the estimator `best_of_group` it is the loss
    of best-of-n distillation (RAFT, Dong et al. 2023).
    """
    mask = batch.require("loss_mask")
    advantages = torch.where(mask, batch.require("advantages"), 0.0)
    per_token = -advantages * torch.where(mask, logprobs, 0.0)
    loss = aggregate(per_token, mask, aggregation=settings.aggregation, denominator=denominator)
    return loss, MetricSums(sums={"policy/loss": loss.detach()})


@policy_loss(
    "pairwise",
    "Bradley-Terry loss on pairs (DPO)",
    reads=("pair_labels",),
    pairs=True,
    reference=True,
)
def pairwise_dpo_loss(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Compute the DPO loss on sampled pairs (Rafailov et al. 2023, eq. 7; Guo et al. 2024).

    `kl_coef` is DPO's beta, and the denominator is the number of pairs in the global mini-batch.
    All tokens of a row have the same advantage: the score of the row minus the score of the other
    row of its pair. A row without a token in `loss_mask` belongs to no pair. With `pair_labels:
    soft`, the better row is preferred with the probability sigmoid(score difference) of the
    Bradley-Terry model, and the loss is the expectation over this label. With `pair_labels: hard`,
    the better row is always preferred.
    """
    mask = batch.require("loss_mask")
    first = mask.int().argmax(dim=1, keepdim=True)
    differences = batch.require("advantages").gather(1, first)[:, 0]
    paired = mask.any(dim=1)
    log_ratio = masked_difference(logprobs, batch.require("ref_logprobs"), mask).sum(dim=1)
    better = paired & (differences > 0)
    signed = torch.where(better, log_ratio, torch.where(paired, -log_ratio, 0.0))
    index = dense_index(batch.require("pair_ids"))
    margins = torch.zeros_like(signed).index_add(0, index, settings.kl_coef * signed)[index]
    preferred = torch.where(better, differences, 0.0).sigmoid()
    if settings.pair_labels == "hard":
        preferred = torch.ones_like(preferred)
    per_pair = -preferred * logsigmoid(margins) - (1 - preferred) * logsigmoid(-margins)
    loss = torch.where(better, per_pair, 0.0).sum() / denominator
    return loss, MetricSums(
        means={
            "policy/pair_accuracy": masked_sum_and_count((margins > 0).to(margins.dtype), better),
            "policy/pair_margin": masked_sum_and_count(margins, better),
        },
        sums={"policy/loss": loss.detach()},
    )


def value_loss(
    values: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Return half the critic's squared error, summed over `loss_mask` and divided by `denominator`.

    With `value_clip` > 0, two squared errors are computed for each token, and the larger one is
    used: the error of the value, and the error of the value that is clipped to within `value_clip`
    of `batch.values`, the value at the start of the update (lm-human-preferences,
    `train_policy.py`).
    """
    mask, clip = batch.require("loss_mask"), settings.value_clip
    values = torch.where(mask, values, 0.0)
    returns = torch.where(mask, batch.require("returns"), 0.0)
    error = (values - returns).square()
    is_clipped = torch.zeros_like(mask)
    if clip:
        old_values = torch.where(mask, batch.require("values"), 0.0)
        clipped_values = values.clamp(old_values - clip, old_values + clip)
        clipped_error = (clipped_values - returns).square()
        is_clipped = clipped_error > error
        error = torch.maximum(error, clipped_error)
    loss = 0.5 * torch.where(mask, error, 0.0).sum() / denominator
    return loss, MetricSums(
        means={
            "value/clip_fraction": masked_sum_and_count(is_clipped.to(values.dtype), mask),
            "value/mean": masked_sum_and_count(values, mask),
        },
        sums={"value/loss": loss.detach()},
    )


def _ratio_loss_metrics(
    loss: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    clipped_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> MetricSums:
    """Return the metrics loss, clip fractions, approx KL and maximum importance ratio."""
    is_clipped = (ratio != clipped_ratio).to(ratio.dtype)
    above = (ratio > clipped_ratio).to(ratio.dtype)
    below = (ratio < clipped_ratio).to(ratio.dtype)
    ratio = torch.where(mask, ratio.detach(), 1.0)
    return MetricSums(
        means={
            "policy/clip_fraction": masked_sum_and_count(is_clipped, mask),
            "policy/clip_fraction_positive": masked_sum_and_count(above, mask & (advantages > 0)),
            "policy/clip_fraction_negative": masked_sum_and_count(below, mask & (advantages < 0)),
            "policy/approx_kl": masked_sum_and_count(approx_kl(log_ratio), mask),
        },
        sums={"policy/loss": loss.detach()},
        maxima={"policy/ratio_max": ratio.amax() if ratio.numel() else ratio.new_ones(())},
    )
