"""Checks before an update is applied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

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
    """Check the losses and the mean log-ratio of one mini-batch.

    Raises:
        Halt: A value is not finite.
    """
    values = {name: pair[0] for name, pair in sums.means.items()} | sums.sums
    losses = {
        name: value for name, value in values.items() if "loss" in name or "approx_kl" in name
    }
    if losses and not torch.stack([value.float() for value in losses.values()]).isfinite().all():
        names = [name for name, value in losses.items() if not value.isfinite()]
        raise Halt(
            "not_finite",
            f"alarm not_finite: {', '.join(names)} is not finite, so the update was not applied",
        )


def check_first_ratio(pair: Tensor, dtype: torch.dtype) -> None:
    """Check that the ratio of the policy to its own earlier log-probabilities is 1.

    Args:
        pair: [2] sum over tokens of r - 1 - log r, and number of tokens, over all processes.
        dtype: dtype of the model.

    Raises:
        Halt: The mean, which is the k3 estimate, exceeds numerical noise.
    """
    deviation = float(pair[0] / pair[1].clamp(min=1))
    tolerance = _RATIO_TOLERANCE.get(dtype, _HALF_TOLERANCE)
    if not deviation <= tolerance:
        raise Halt(
            "first_ratio",
            f"alarm first_ratio: before the first update the mean k3 estimate is "
            f"{deviation:.3g}, above {tolerance:g}: two passes of one policy disagree (dropout, or "
            "a layer that depends on the other rows of a batch)",
        )


def check_gradient_norm(norm: float, *, step: int, learning_rate_key: str) -> None:
    """Check the global norm of the gradients.

    Args:
        step: Number of the step, counted from 1.
        learning_rate_key: Configuration key of the learning rate.

    Raises:
        Halt: The norm is not finite.
    """
    if not math.isfinite(norm):
        raise Halt(
            "not_finite",
            f"training diverged in step {step}: the gradient is not finite; lower "
            f"{learning_rate_key} and continue from the last checkpoint with --resume",
        )


def check_trainable(optimizer: torch.optim.Optimizer, trained: Sequence[Tensor]) -> None:
    """Check that every weight that should train requires a gradient, and that some have one.

    A single weight without a gradient is allowed: an expert to which no token was routed, or the
    policy during the critic's warm-up.

    Args:
        optimizer: After a backward pass.
        trained: The weights of the model that should train.

    Raises:
        Halt: A trained weight of the model is not in the optimizer, a weight of the optimizer does
            not require a gradient, or no weight has one.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    learning = {id(weight) for weight in weights if weight.requires_grad}
    expected = {id(weight) for weight in (*weights, *trained)}
    frozen = len(expected - learning)
    if frozen or all(weight.grad is None for weight in weights):
        raise Halt(
            "frozen",
            f"alarm frozen: {frozen or len(expected)} of {len(expected)} weights that should train "
            "have no gradient",
        )


def as_dict(batch: TrainingBatch) -> dict[str, torch.Tensor]:
    """Return the fields of a batch that are not None, on the CPU."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value.cpu() for name, value in values.items() if value is not None}
