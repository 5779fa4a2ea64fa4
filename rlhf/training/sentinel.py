"""Checks before an update is applied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.metrics import MetricSums
from rlhf.rollout.batch import Rollout
from rlhf.runs.alarms import Halt

_RATIO_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-6}
"""Largest mean k3 estimate of ratios that should be 1, by the dtype of the model."""
_HALF_TOLERANCE = 5e-3


def check_rewards(rollouts: Sequence[Rollout], rewards: Sequence[Sequence[float]]) -> None:
    """Check the training rewards of a step.

    A nan marks an episode without a score; penalties must not create one.

    Args:
        rewards: Training rewards of the tokens of each episode.

    Raises:
        Halt: A reward is infinite, a penalty is nan, or no episode has a score.
    """
    evidence = {"scores": [r.score for r in rollouts], "rewards": [list(row) for row in rewards]}
    check_scores(evidence["scores"], evidence["rewards"], evidence)


def check_scores(
    scores: Sequence[float], rewards: Sequence[Sequence[float]], evidence: Mapping[str, Any]
) -> None:
    """Check training rewards like `check_rewards`, with episode scores instead of rollouts."""
    totals = [sum(row) for row in rewards]
    for score, total in zip(scores, totals, strict=True):
        if math.isinf(score) or math.isinf(total) or (math.isnan(total) and not math.isnan(score)):
            raise Halt(
                "not_finite",
                f"alarm not_finite: an episode has the score {score} and the training reward "
                f"{total}; correct the reward or the keys of shaping",
                evidence,
            )
    if all(map(math.isnan, scores)):
        raise Halt("nothing_scored", "alarm nothing_scored: no episode has a score", evidence)


def check_batch(batch: TrainingBatch, *, kl_coef: float) -> None:
    """Check the tensors of an online update.

    Raises:
        Halt: A log-probability, an advantage, a target of the critic or the KL coefficient is not
            finite.
    """
    masks = {
        "old_logprobs": batch.action_mask,
        "ref_logprobs": batch.action_mask,
        "advantages": batch.require("loss_mask"),
        "returns": batch.require("loss_mask"),
    }
    wrong = [] if math.isfinite(kl_coef) else ["the KL coefficient"]
    for name, mask in masks.items():
        value = getattr(batch, name)
        if value is not None and not torch.where(mask, value, 0.0).isfinite().all():
            wrong.append(name)
    if wrong:
        raise Halt(
            "not_finite",
            f"alarm not_finite: {', '.join(wrong)} of the batch are not finite, so no update was "
            "applied",
            {"batch": as_dict(batch), "kl_coef": kl_coef},
        )


def check_losses(sums: MetricSums) -> None:
    """Check the losses of one mini-batch.

    Raises:
        Halt: A loss is not finite.
    """
    losses = {name: pair[0] for name, pair in sums.means.items() if name.endswith("loss")}
    losses |= {name: value for name, value in sums.sums.items() if name.endswith("loss")}
    if losses and not torch.stack([value.float() for value in losses.values()]).isfinite().all():
        names = [name for name, value in losses.items() if not value.isfinite()]
        raise Halt(
            "not_finite",
            f"alarm not_finite: {', '.join(names)} is not finite, so the update was not applied",
        )


def check_first_ratio(sums: MetricSums, dtype: torch.dtype) -> None:
    """Check that the importance ratio of the first mini-batch of a step is 1.

    Args:
        sums: Metrics of the mini-batch over all processes.
        dtype: dtype of the model.

    Raises:
        Halt: The k3 estimate, mean of r - 1 - log r, exceeds numerical noise.
    """
    pair = sums.means.get("policy/approx_kl")
    if pair is None:
        return
    deviation = float(pair[0] / pair[1].clamp(min=1))
    tolerance = _RATIO_TOLERANCE.get(dtype, _HALF_TOLERANCE)
    if not deviation <= tolerance:
        raise Halt(
            "first_ratio",
            f"alarm first_ratio: before the first update of a step the mean k3 estimate is "
            f"{deviation:.3g}, above {tolerance:g}: two passes of one policy disagree (dropout, or "
            "a layer that depends on the other rows of a batch)",
        )


def check_trainable(optimizer: torch.optim.Optimizer) -> None:
    """Check that the weights of the optimizer receive gradients.

    Raises:
        Halt: A weight does not require a gradient, or no weight has one.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    frozen = sum(not weight.requires_grad for weight in weights)
    if frozen or all(weight.grad is None for weight in weights):
        count = frozen or len(weights)
        raise Halt(
            "frozen",
            f"alarm frozen: {count} of {len(weights)} weights that should train have no gradient",
        )


def as_dict(batch: TrainingBatch) -> dict[str, torch.Tensor]:
    """Return the fields of a batch that are not None, on the CPU."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value.cpu() for name, value in values.items() if value is not None}
