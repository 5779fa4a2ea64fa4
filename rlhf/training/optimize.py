"""Optimizer steps on a training batch, in epochs, mini-batches and micro-batches."""

from __future__ import annotations

import numpy as np
import torch

from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.losses import compute_loss, loss_denominator
from rlhf.algorithms.metrics import MetricSums
from rlhf.errors import UserError
from rlhf.runs.alarms import Halt
from rlhf.training.batching import group_into_micro_batches
from rlhf.training.numeric_checks import (
    check_batch_is_finite,
    check_losses_are_finite,
    check_ratios_before_first_update,
    tensors_on_cpu,
)
from rlhf.training.online_parts import OnlineTrainerParts


def update_policy(
    trainer: OnlineTrainerParts, batch: TrainingBatch, *, step: int
) -> dict[str, float]:
    """Take all optimizer steps on one batch; the policy and its critic are updated in place.

    Every loss is a sum over tokens, sequences or pairs, divided by a count over the whole
    mini-batch. Therefore the size of the micro-batches and the number of processes affect only
    memory and time.

    Args:
        trainer: The trainer with the policy, its optimizer and the algorithm.
        batch: Batch from ``make_training_batch``.
        step: Index of the training step, which seeds the shuffle. In the first
            ``critic_warmup_steps`` steps only the critic is trained.

    Returns:
        Means of the metrics over all optimizer steps (for ``policy/ratio_max``, the maximum), and
        the number of these steps as ``train/updates``.

    Raises:
        Halt: A check before an update failed; the update is not applied.
        UserError: The loss has no gradient.
    """
    check_batch_is_finite(batch, kl_coef=trainer.kl.coef)
    config, settings = trainer.config, trainer.algorithm.settings
    rng = np.random.default_rng([config.seed, step])
    critic_only = step < config.critic_warmup_steps
    total, norms = MetricSums(), []
    for _ in range(settings.num_epochs):
        for rows in shuffle_into_mini_batches(batch, settings.num_minibatches, rng):
            first = not norms
            try:
                sums = compute_checked_gradients(
                    trainer, batch, rows, critic_only=critic_only, first=first
                )
                norms.append(trainer.clip_and_apply_gradients())
            except Halt as halt:
                halt.evidence = {"batch": tensors_on_cpu(batch), "rows": rows}
                halt.evidence |= {"critic_only": critic_only, "first": first}
                raise
            total = total + sums
    metrics = total.compute()
    metrics |= {name: metrics[name] / max(len(norms), 1) for name in total.sums}
    if norms:
        metrics["train/grad_norm"] = float(np.mean(norms))
    return {**metrics, "train/updates": len(norms)}


def shuffle_into_mini_batches(
    batch: TrainingBatch, count: int, rng: np.random.Generator
) -> list[torch.Tensor]:
    """Shuffle the rows with trained tokens and split them into at most ``count`` mini-batches.

    The rows of a pair are in the same mini-batch.

    Returns:
        The row indices of each mini-batch; empty if no row has a trained token.
    """
    pair_ids = batch.require("pair_ids").cpu().numpy()
    included = batch.require("loss_mask").any(1).cpu().numpy()
    ids = rng.permutation(np.unique(pair_ids[included]))
    splits = np.array_split(ids, min(count, len(ids))) if len(ids) else []
    rows = [np.flatnonzero(np.isin(pair_ids, split) & included) for split in splits]
    return [torch.as_tensor(indices) for indices in rows]


def compute_checked_gradients(
    trainer: OnlineTrainerParts,
    batch: TrainingBatch,
    rows: torch.Tensor,
    *,
    critic_only: bool,
    first: bool,
) -> MetricSums:
    """Compute the gradients of one mini-batch over all processes, and check its losses.

    Args:
        trainer: The trainer with the policy and the algorithm.
        batch: The batch of the training step.
        rows: Indices in ``batch`` of the rows of the mini-batch.
        critic_only: Whether only the critic is trained in this step.
        first: Whether this is the first mini-batch. If so, the policy has not changed since the old
            log-probabilities of the batch were computed.

    Returns:
        Metrics over all processes.

    Raises:
        Halt: A loss is not finite, or ``first`` is set and importance ratios differ from 1.
        UserError: The loss has no gradient.
    """
    sums = accumulate_gradients(trainer, batch, rows, critic_only=critic_only)
    if first and not critic_only:  # all mini-batches of a step train the same weights
        trainer.record_weights_without_gradient()
    trainer.world.all_reduce_gradients(trainer.policy.parameters())
    if critic_only:
        # If the critic shares the transformer, the value loss also has gradients in the policy.
        trainer.policy.model.zero_grad(set_to_none=True)
    sums = trainer.world.sum_metrics(sums)
    check_losses_are_finite(sums, learning_rate_key=trainer.learning_rate_key)
    if first:
        check_ratios_before_first_update(sums.means["policy/approx_kl"], trainer.policy.model.dtype)
    return sums


def accumulate_gradients(
    trainer: OnlineTrainerParts, batch: TrainingBatch, rows: torch.Tensor, *, critic_only: bool
) -> MetricSums:
    """Accumulate the gradients of this process's micro-batches; return their metrics.

    Raises:
        UserError: The loss has no gradient.
    """
    rows = rows.to(trainer.policy.device)
    mask = batch.require("loss_mask")[rows]
    denominator = loss_denominator(trainer.algorithm, mask, max_tokens=trainer.max_episode_tokens)
    total = MetricSums()
    attention_mask = batch.attention_mask[rows]
    all_rows = group_into_micro_batches(
        batch.tokens[rows],
        attention_mask,
        batch.require("pair_ids")[rows].tolist(),
        max_tokens=trainer.config.micro_batch_tokens,
        packed=trainer.policy.packs_rows(attention_mask.sum(1)),
    )
    for indices, weight in trainer.world.own_micro_batches_with_weights(all_rows):
        micro_batch = batch.select(rows[indices])
        scored = trainer.policy.score(
            micro_batch.tokens,
            micro_batch.attention_mask,
            micro_batch.action_mask,
            temperature=trainer.config.rollout.temperature,
        )
        loss, sums = compute_loss(
            trainer.algorithm,
            scored.logprobs,
            micro_batch,
            denominator=denominator,
            kl_coef=trainer.kl.coef,
            entropy=scored.entropy,
            values=scored.values,
            critic_denominator=mask.sum(),
            critic_only=critic_only,
        )
        if not loss.requires_grad:
            raise UserError(
                "the loss has no gradient: a loss of your own must not detach the "
                "log-probabilities, and requires_grad of the weights must stay as it is"
            )
        (weight * loss).backward()
        if weight:
            total = total + sums
    return total
