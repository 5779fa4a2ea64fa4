"""The losses of a policy update, by an algorithm's row; see `registry` for how the loop calls them.

All tensors are [B, T] unless said otherwise: rows are episodes, index t describes token t.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms import losses
from rlhf.algorithms.credit import Credit, needed
from rlhf.algorithms.kl import Denominator, kl_loss
from rlhf.algorithms.metrics import MetricSums
from rlhf.algorithms.registry import Algorithm
from rlhf.algorithms.settings import Settings


@dataclass(frozen=True)
class _Inputs:
    logprobs: Tensor  # [B, T]
    old_logprobs: Tensor  # [B, T]
    ref_logprobs: Tensor | None  # [B, T]
    credit: Credit
    denominator: Tensor  # scalar
    kl_coef: float


def denominator_for(algorithm: Algorithm, mask: Tensor, *, max_tokens: int) -> Tensor:
    """What the policy loss of a global mini-batch is divided by; adds up over processes.

    Args:
        algorithm: a configured row.
        mask: `Credit.mask` of the mini-batch.
        max_tokens: most tokens an episode can sample; used by aggregation "constant".
    """
    sequences = mask.any(dim=1).sum()
    if algorithm.loss == "pairwise":
        return sequences / 2
    return {
        "token": mask.sum(),
        "sequence": sequences,
        "constant": sequences * max_tokens,
    }[algorithm.settings.aggregation]


def policy_loss_for(
    algorithm: Algorithm,
    logprobs: Tensor,
    credit: Credit,
    *,
    denominator: Denominator,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[Tensor, MetricSums]:
    """The row's policy loss, with its divergence term and entropy bonus where it has them.

    Args:
        algorithm: a configured row.
        logprobs: of the sampled tokens under the policy; carries the gradient.
        credit: rows of this micro-batch.
        denominator: of the global mini-batch (`denominator_for`); nothing to learn where 0.
        old_logprobs: under the policy that made the rollouts, computed by the trainer.
        ref_logprobs: under the reference; needed where `algorithm.reference`.
        entropy: of the policy at each token; needed where `entropy_coef` is not 0, else only told.
        kl_coef: the controller's present coefficient.
    """
    settings, mask = algorithm.settings, credit.mask
    denominator = torch.as_tensor(denominator, dtype=logprobs.dtype).clamp(min=1)
    inputs = _Inputs(logprobs, old_logprobs, ref_logprobs, credit, denominator, kl_coef)
    loss, tally = _LOSSES[algorithm.loss](inputs, settings)
    shared: dict[str, Any] = {"denominator": denominator, "aggregation": settings.aggregation}
    if algorithm.kl_in_loss:
        divergence, told = kl_loss(
            logprobs,
            needed(ref_logprobs, "ref_logprobs"),
            mask,
            estimator=settings.kl_estimator,
            **shared,
        )
        loss, tally = loss + kl_coef * divergence, tally + told
    if entropy is not None:
        bonus, told = losses.entropy_bonus(entropy, mask, **shared)
        tally = tally + told
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * bonus
    return loss, tally


def value_loss_for(
    algorithm: Algorithm,
    values: Tensor,
    credit: Credit,
    *,
    old_values: Tensor,
    denominator: Denominator,
) -> tuple[Tensor, MetricSums]:
    """The critic's loss times `value_coef`; `denominator` is the mini-batch's number of tokens."""
    settings = algorithm.settings
    loss, tally = losses.value_loss(
        values,
        old_values,
        credit.returns,
        credit.mask,
        denominator=torch.as_tensor(denominator, dtype=values.dtype).clamp(min=1),
        clip=settings.value_clip,
    )
    return settings.value_coef * loss, tally


def _clipped(x: _Inputs, s: Settings) -> tuple[Tensor, MetricSums]:
    return losses.policy_loss(
        x.logprobs,
        x.old_logprobs,
        x.credit.advantages,
        x.credit.mask,
        denominator=x.denominator,
        aggregation=s.aggregation,
        clip_low=s.clip_low,
        clip_high=s.clip_high,
        dual_clip=s.dual_clip,
    )


def _clipped_sequence(x: _Inputs, s: Settings) -> tuple[Tensor, MetricSums]:
    return losses.sequence_policy_loss(
        x.logprobs,
        x.old_logprobs,
        x.credit.advantages,
        x.credit.mask,
        denominator=x.denominator,
        aggregation=s.aggregation,
        clip_low=s.clip_low,
        clip_high=s.clip_high,
    )


def _clipped_weight(x: _Inputs, s: Settings) -> tuple[Tensor, MetricSums]:
    return losses.clipped_weight_loss(
        x.logprobs,
        x.old_logprobs,
        x.credit.advantages,
        x.credit.mask,
        denominator=x.denominator,
        aggregation=s.aggregation,
        clip_low=s.clip_low,
        clip_high=s.clip_high,
    )


def _likelihood(x: _Inputs, s: Settings) -> tuple[Tensor, MetricSums]:
    return losses.likelihood_loss(
        x.logprobs,
        x.credit.advantages,
        x.credit.mask,
        denominator=x.denominator,
        aggregation=s.aggregation,
    )


def _pairwise(x: _Inputs, s: Settings) -> tuple[Tensor, MetricSums]:
    first = x.credit.mask.int().argmax(dim=1, keepdim=True)
    return losses.pairwise_loss(
        x.logprobs,
        needed(x.ref_logprobs, "ref_logprobs"),
        x.credit.advantages.gather(1, first)[:, 0],
        x.credit.units,
        x.credit.mask,
        denominator=x.denominator,
        beta=x.kl_coef,
        pair_labels=s.pair_labels,
    )


_LOSSES: dict[str, Callable[[_Inputs, Settings], tuple[Tensor, MetricSums]]] = {
    "clipped": _clipped,
    "clipped_sequence": _clipped_sequence,
    "clipped_weight": _clipped_weight,
    "likelihood": _likelihood,
    "pairwise": _pairwise,
}
