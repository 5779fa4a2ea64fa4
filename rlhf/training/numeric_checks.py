"""Checks before an update is applied or a model is saved. They raise `Halt` with an alarm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.metrics import MetricSums
from rlhf.models.sharding.tensors import local_part
from rlhf.rollout.batch import Rollout
from rlhf.runs.alarms import Halt
from rlhf.training.distributed import World

_RATIO_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-6}
"""Dtype of the model -> maximum mean k3 estimate before the first update on a batch."""
_HALF_TOLERANCE = 0.05
"""Maximum mean k3 estimate over many tokens, for all other dtypes. Two passes over SmolLM2-135M in
bfloat16 give 0.002 to 0.005; attention dropout of 0.05 gives 0.27."""
_HALF_OUTLIERS = 4.0
"""Sum of the k3 estimates of a few tokens that is tolerated in addition. For these dtypes, rounding
of large logits changes the ratio of a single token up to a factor of about 5, whose k3 estimate is
2.4, so that the mean over a small mini-batch varies."""


def check_rewards(rollouts: Sequence[Rollout], rewards: Sequence[Sequence[float]]) -> None:
    """Check the training rewards of a step.

    The score of an episode that could not be scored is nan. All other scores and penalties must be
    finite.

    Args:
        rollouts: The episodes of the step.
        rewards: Training rewards of the tokens of each episode.

    Raises:
        Halt: A reward is infinite, a penalty is nan, or no episode has a score.
    """
    evidence = {"scores": [r.score for r in rollouts], "rewards": [list(row) for row in rewards]}
    check_scores_and_rewards_are_finite(evidence["scores"], evidence["rewards"], evidence)


def check_scores_and_rewards_are_finite(
    scores: Sequence[float], rewards: Sequence[Sequence[float]], evidence: Mapping[str, Any]
) -> None:
    """Check scores and training rewards; see `check_rewards`.

    Args:
        scores: Score of each episode; nan if it could not be scored.
        rewards: Training rewards of the tokens of each episode.
        evidence: Data that are saved with the alarm.

    Raises:
        Halt: A reward is infinite, a penalty is nan, or no episode has a score.
    """
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


def check_batch_is_finite(batch: TrainingBatch, *, kl_coef: float) -> None:
    """Check that the tensors of an online update are finite.

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
            f"alarm not_finite: these inputs of the update are not finite, so it was not applied: "
            f"{', '.join(wrong)}; check the model, the rewards and optimizer.learning_rate",
            {"batch": tensors_on_cpu(batch), "kl_coef": kl_coef},
        )


def check_losses_are_finite(sums: MetricSums, *, learning_rate_key: str) -> None:
    """Check that the losses and the approx KL of a mini-batch are finite.

    Args:
        sums: Metrics of the mini-batch over all processes.
        learning_rate_key: Configuration key of the learning rate, for the message.

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
            f"alarm not_finite: these losses are not finite, so the update was not applied: "
            f"{', '.join(names)}; lower {learning_rate_key}, or correct a loss of your own",
        )


def check_ratios_before_first_update(k3_sum_and_count: Tensor, dtype: torch.dtype) -> None:
    """Check that the importance ratios are 1 before the first update on a batch.

    Args:
        k3_sum_and_count: [2], sum of r - 1 - log r over the tokens of all processes, and their
            number.
        dtype: Dtype of the model.

    Raises:
        Halt: The mean, which is the k3 estimate, exceeds the tolerance for rounding errors.
    """
    count = float(k3_sum_and_count[1].clamp(min=1))
    deviation = float(k3_sum_and_count[0]) / count
    tolerance = _RATIO_TOLERANCE.get(dtype, _HALF_TOLERANCE + _HALF_OUTLIERS / count)
    if not deviation <= tolerance:
        raise Halt(
            "first_ratio",
            f"alarm first_ratio: before the first update the mean k3 estimate is "
            f"{deviation:.3g}, above {tolerance:g}: two forward passes of the same policy give "
            "different log-probabilities (dropout, or a layer that depends on other rows of the "
            "batch)",
        )


def _divergence_advice(learning_rate_key: str, *, can_change_rate: bool) -> str:
    """Return the advice in the message of a diverged run, to lower the learning rate.

    Args:
        learning_rate_key: Configuration key of the learning rate.
        can_change_rate: Whether a resumed run can have another learning rate.
    """
    text = f"lower {learning_rate_key} and start a new run"
    if not can_change_rate:
        return text
    return (
        f"{text}, or, if the last checkpoint precedes the divergence, continue with --resume, a "
        f"lower rate and allow_changes: [{learning_rate_key}]"
    )


def check_gradient_norm_is_finite(
    norm: float, *, step: int, learning_rate_key: str, can_change_rate: bool = True
) -> None:
    """Check that the global norm of the gradients is finite.

    Args:
        norm: The global norm.
        step: Number of the training step, counted from 1.
        learning_rate_key: Configuration key of the learning rate, for the message.
        can_change_rate: Whether a resumed run can have another learning rate.

    Raises:
        Halt: The norm is not finite.
    """
    if not math.isfinite(norm):
        raise Halt(
            "not_finite",
            f"training diverged in step {step}: the gradient is not finite; "
            + _divergence_advice(learning_rate_key, can_change_rate=can_change_rate),
        )


def check_parameters_are_trained(
    optimizer: torch.optim.Optimizer, trained: Sequence[Tensor]
) -> None:
    """Check that every trained parameter requires a gradient, and that at least one has a gradient.

    Some parameters may have no gradient, for example those of an expert to which no token was
    routed, or those of the policy during the critic's warm-up.

    Args:
        optimizer: The optimizer, after a backward pass.
        trained: The trained parameters of the model.

    Raises:
        Halt: A trained parameter is not in the optimizer, a parameter in the optimizer does not
            require a gradient, or none of the parameters has a gradient.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    learning = {id(weight) for weight in weights if weight.requires_grad}
    expected = {id(weight) for weight in (*weights, *trained)}
    frozen = len(expected - learning)
    if frozen:
        raise Halt(
            "frozen",
            f"alarm frozen: {frozen} of {len(expected)} trained parameter tensors do not require a "
            "gradient, or are not in the optimizer",
        )
    if all(weight.grad is None for weight in weights):
        message = f"none of the {len(expected)} trained parameter tensors has a gradient"
        raise Halt("frozen", f"alarm frozen: {message}")


def check_weights_are_finite(
    model: nn.Module,
    *,
    step: int,
    learning_rate_key: str,
    can_change_rate: bool = True,
    world: World | None = None,
) -> None:
    """Check that the weights of a model are finite, before it is evaluated and saved.

    Args:
        model: The model.
        step: Number of completed steps.
        learning_rate_key: Configuration key of the learning rate.
        can_change_rate: Whether a resumed run can have another learning rate.
        world: The processes of the run; required if the model is sharded.

    Raises:
        Halt: A weight is not finite.
    """
    weights = dict(model.named_parameters())
    wrong = [name for name, weight in weights.items() if not local_part(weight).isfinite().all()]
    if world is not None and world.sharded_model:  # each process checks its rows
        wrong = list(dict.fromkeys(name for names in world.gather(wrong) for name in names))
    if wrong:
        raise Halt(
            "not_finite",
            f"training diverged: after step {step}, {len(wrong)} of {len(weights)} parameter "
            f"tensors are not finite (the first is {wrong[0]}), so the model is not saved; "
            + _divergence_advice(learning_rate_key, can_change_rate=can_change_rate),
        )


def tensors_on_cpu(batch: TrainingBatch) -> dict[str, torch.Tensor]:
    """Return field name -> tensor on the CPU, for the fields of a batch that are not None."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value.cpu() for name, value in values.items() if value is not None}
