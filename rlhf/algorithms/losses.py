"""Policy losses, the value loss, and the total loss with the KL and the entropy bonus.

A policy loss is a decorated function of the new log-probabilities, a `TrainingBatch` and the
settings; `Algorithm.loss` is its name. All tensors are [B, T] unless stated otherwise; index t
describes token t. Entries outside `batch.loss_mask` may have any value, nan included, and affect
neither values nor gradients. The caller supplies the denominator of the *global* mini-batch, so
that losses and metrics can be added over micro-batches. Every policy loss, `value_loss` and
`compute_loss` return a scalar and a `MetricSums`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.batch import TrainingBatch, dense_index
from rlhf.algorithms.components import policy_loss
from rlhf.algorithms.kl import kl_estimate, masked_difference
from rlhf.algorithms.metrics import MetricSums, masked_sum_and_count
from rlhf.algorithms.settings import Settings

Denominator = float | Tensor


def loss_denominator(algorithm: Algorithm, mask: Tensor, *, max_tokens: int) -> Tensor:
    """Return the denominator of the policy loss of a mini-batch, a scalar.

    Args:
        algorithm: the algorithm and its settings.
        mask: `loss_mask` of the mini-batch of all processes.
        max_tokens: largest number of tokens that can be sampled in an episode; used by aggregation
            "constant".
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
    num_tokens: Denominator | None = None,
    critic_only: bool = False,
) -> tuple[Tensor, MetricSums]:
    """Return the algorithm's loss (policy, KL, entropy bonus and critic) and its metrics.

    Args:
        algorithm: the algorithm and its settings.
        logprobs: log-probabilities [B, T] of the tokens under the policy, with gradients.
        batch: a micro-batch, after `estimate_advantages`.
        denominator: denominator of the global mini-batch, from `loss_denominator`; if it is 0, the
        loss is 0.
        kl_coef: current coefficient of the KL controller.
        entropy: entropy [B, T] of the policy; required if `entropy_coef` is not 0, otherwise used
        only for a metric.
        values: values [B, T] of the critic; None omits the critic's loss.
        num_tokens: denominator of the critic's loss, which is the number of tokens in `loss_mask`
        of the global mini-batch; None: the number of tokens in `loss_mask` of this batch.
        critic_only: return only the critic's loss, but the metrics of all terms.
    """
    settings = replace(algorithm.settings, kl_coef=kl_coef)
    denominator = torch.as_tensor(denominator, dtype=logprobs.dtype).clamp(min=1)
    mask = batch.require("loss_mask")

    def mean(per_token: Tensor) -> Tensor:
        return aggregate(per_token, mask, aggregation=settings.aggregation, denominator=denominator)

    loss_function = algorithm.policy_loss.function
    loss, metrics = loss_function(logprobs, batch, settings, denominator=denominator)
    value_metrics = MetricSums()
    terms: dict[str, Tensor] = {}
    if algorithm.kl_in_loss:  # GRPO, Shao et al. 2024, eq. 3 and 4
        reference = batch.require("ref_logprobs")
        kl = kl_estimate(logprobs, reference, mask, estimator=settings.kl_estimator)
        loss, terms["policy/kl_in_loss"] = loss + kl_coef * mean(kl), kl
    if entropy is not None:
        terms["policy/entropy"] = entropy
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * mean(entropy)
    if values is not None:
        count = mask.sum() if num_tokens is None else num_tokens
        count = torch.as_tensor(count, dtype=values.dtype).clamp(min=1)
        error, value_metrics = value_loss(values, batch, settings, denominator=count)
        error = settings.value_coef * error
        loss = error if critic_only else loss + error
    if "policy/approx_kl" not in metrics.means and batch.old_logprobs is not None:
        terms["policy/approx_kl"] = approx_kl(masked_difference(logprobs, batch.old_logprobs, mask))
    means = {name: masked_sum_and_count(term, mask) for name, term in terms.items()}
    return loss, metrics + MetricSums(means=means) + value_metrics


def aggregate(
    per_token: Tensor, mask: Tensor, *, aggregation: str, denominator: Denominator
) -> Tensor:
    """Sum the loss of the tokens inside `mask` and divide it by `denominator`.

    Args:
        per_token: loss of each token.
        mask: True for the tokens to sum over.
        aggregation: "token" and "constant" weight all tokens equally. "sequence" takes the mean of
            each sequence first, which gives the tokens of short completions more weight.
        denominator: denominator of the global mini-batch, from `loss_denominator`. It is the number
            of tokens ("token"), the number of sequences ("sequence"), or the number of sequences
            times a fixed length as in Dr. GRPO ("constant").

    Returns:
        A scalar.
    """
    total = torch.where(mask, per_token, 0.0).sum(dim=1)
    if aggregation == "sequence":
        total = total / mask.sum(dim=1).clamp(min=1)
    return total.sum() / denominator


@policy_loss(
    "clipped",
    "token ratio, clipped",
    reads=("clip_low", "clip_high", "dual_clip", "tis_cap", "aggregation", "entropy_coef"),
)
def clipped(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Compute the clipped surrogate with one ratio per token (PPO, Schulman et al. 2017, eq. 7).

    The loss of a token is -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). A `clip_high` above
    `clip_low` is DAPO's "clip higher" (Yu et al. 2025). If `dual_clip` = c > 1, the loss of a token
    with A < 0 is at most -c A (Ye et al. 2020); 0 disables this bound.
    """
    mask = batch.require("loss_mask")
    log_ratio = masked_difference(logprobs, batch.require("old_logprobs"), mask)
    return _clipped_surrogate(
        log_ratio, log_ratio, batch, settings, settings.dual_clip, denominator=denominator
    )


@policy_loss(
    "clipped_sequence",
    "sequence ratio, clipped",
    reads=("clip_low", "clip_high", "tis_cap", "aggregation", "entropy_coef"),
)
def clipped_sequence(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Compute the clipped surrogate with one ratio per sequence (GSPO, Zheng et al. 2025, sec. 4).

    The ratio s = (pi / pi_old)^(1 / length) is the exponential of the mean log-ratio. The
    implementation is the paper's GSPO-token: the ratio of each token has the value s, and its
    gradient is s times the gradient of the token's log-probability. If all tokens of a sequence
    have the same advantage, the value and the gradient of the loss are those of GSPO. Tokens may
    also have different advantages, as with return to go.
    """
    mask = batch.require("loss_mask")
    log_ratio = masked_difference(logprobs, batch.require("old_logprobs"), mask)
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)
    sequence_log_ratio = log_ratio.detach().sum(dim=1, keepdim=True) / length
    log_weight = sequence_log_ratio + log_ratio - log_ratio.detach()
    return _clipped_surrogate(log_weight, log_ratio, batch, settings, 0.0, denominator=denominator)


def _clipped_surrogate(
    log_weight: Tensor,
    log_ratio: Tensor,
    batch: TrainingBatch,
    settings: Settings,
    dual_clip: float,
    *,
    denominator: Denominator,
) -> tuple[Tensor, MetricSums]:
    """Return the clipped surrogate loss and its metrics.

    The importance ratio in the loss is exp(`log_weight`); `log_ratio`, the log-ratio of each token,
    is used for the metric approx KL.
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
    return loss, _ratio_loss_metrics(loss, log_ratio, ratio, ratio != clipped_ratio, mask)


@policy_loss(
    "clipped_weight",
    "log-likelihood with clipped constant weight",
    reads=("clip_low", "clip_high", "tis_cap", "aggregation", "entropy_coef"),
)
def clipped_weight(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Weight the log-likelihood by the advantage and a clipped constant (CISPO, MiniMax 2025).

    The loss of a token is -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi, where sg stops the
    gradient. Unlike in PPO, a clipped token keeps its gradient.
    """
    mask = batch.require("loss_mask")
    log_ratio = masked_difference(logprobs, batch.require("old_logprobs"), mask)
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    advantages = torch.where(mask, batch.require("advantages"), 0.0)
    per_token = -weight * advantages * torch.where(mask, logprobs, 0.0)
    loss = aggregate(per_token, mask, aggregation=settings.aggregation, denominator=denominator)
    return loss, _ratio_loss_metrics(loss, log_ratio, ratio, ratio != weight, mask)


@policy_loss("likelihood", "weighted log-likelihood", reads=("aggregation", "entropy_coef"))
def likelihood(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Compute the negative log-likelihood weighted by the advantages.

    This is REINFORCE (Williams 1992), or best-of-n distillation if the advantage is 1 for the best
    of each group (RAFT, Dong et al. 2023).
    """
    mask = batch.require("loss_mask")
    advantages = torch.where(mask, batch.require("advantages"), 0.0)
    per_token = -advantages * torch.where(mask, logprobs, 0.0)
    loss = aggregate(per_token, mask, aggregation=settings.aggregation, denominator=denominator)
    return loss, MetricSums(sums={"policy/loss": loss.detach()})


@policy_loss(
    "pairwise", "Bradley-Terry on pairs", reads=("pair_labels",), pairs=True, reference=True
)
def pairwise(
    logprobs: Tensor, batch: TrainingBatch, settings: Settings, *, denominator: Denominator
) -> tuple[Tensor, MetricSums]:
    """Compute the DPO loss on sampled pairs (Rafailov et al. 2023, eq. 7; Guo et al. 2024).

    `kl_coef` is DPO's beta, and the denominator is the number of pairs in the global mini-batch.
    The advantage of a row, which is equal at all tokens, is its score minus the score of the other
    row of its pair. A row without a token in `loss_mask` belongs to no pair. With `pair_labels:
    soft`, the label "the better row is preferred" has the probability sigma(score difference), so
    the loss is its expectation under the Bradley-Terry model. With `hard`, the better row is always
    preferred.
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

    With `value_clip` > 0, the squared error of a token is the maximum of two: that of the value,
    and that of the value clipped to within `value_clip` of the value at rollout
    (lm-human-preferences, `train_policy.py`). 0 disables clipping.
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


def approx_kl(log_ratio: Tensor) -> Tensor:
    """Return the k3 estimate r - 1 - log r of KL(old || new) for each token, [B, T], detached.

    Args:
        log_ratio: [B, T], log r = log pi - log pi_old.
    """
    x = log_ratio.detach()
    return torch.expm1(x) - x


def _ratio_loss_metrics(
    loss: Tensor, log_ratio: Tensor, ratio: Tensor, is_clipped: Tensor, mask: Tensor
) -> MetricSums:
    """Return the loss, clip fraction, approx KL and largest ratio as metrics of a ratio loss."""
    ratio = torch.where(mask, ratio.detach(), 1.0)
    return MetricSums(
        means={
            "policy/clip_fraction": masked_sum_and_count(is_clipped.to(ratio.dtype), mask),
            "policy/approx_kl": masked_sum_and_count(approx_kl(log_ratio), mask),
        },
        sums={"policy/loss": loss.detach()},
        maxima={"policy/ratio_max": ratio.amax() if ratio.numel() else ratio.new_ones(())},
    )
