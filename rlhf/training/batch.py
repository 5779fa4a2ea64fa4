"""Convert rollouts to a training batch with log-probabilities, values and advantages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from rlhf.algorithms.advantages import estimate_advantages
from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.kl import sequence_kl
from rlhf.algorithms.metrics import explained_variance
from rlhf.algorithms.off_policy import off_policy_metrics
from rlhf.rollout.batch import Rollout, collate
from rlhf.training.batching import group_into_micro_batches
from rlhf.training.online_parts import OnlineTrainerParts


@torch.no_grad()
def make_training_batch(
    trainer: OnlineTrainerParts, rollouts: Sequence[Rollout], rewards: Sequence[Sequence[float]]
) -> tuple[TrainingBatch, dict[str, float]]:
    """Compute log-probabilities, values and advantages of rollouts.

    Args:
        trainer: The trainer, with the policy, the reference and the algorithm.
        rollouts: The B episodes of a training step.
        rewards: Training rewards of the tokens of each episode, from ``shaped_rewards``.

    Returns:
        The training batch with B rows, and metrics of the KL, the critic and the sampler.
    """
    batch = _collate_and_compute_logprobs(trainer, rollouts, rewards)
    batch = estimate_advantages(
        trainer.algorithm,
        batch,
        kl_coef=trainer.kl.coef,
        multiplier=trainer.multiplier.value if trainer.multiplier else 0.0,
    )
    old = batch.require("old_logprobs")
    gap = (batch.require("sampler_logprobs") - old)[batch.action_mask]
    metrics = {
        "sampler/logprob_diff_mean": gap.mean().item(),
        "sampler/logprob_diff_abs": gap.abs().mean().item(),
        "sampler/ratio_max": gap.neg().max().exp().item(),
    }
    metrics |= off_policy_metrics(batch, trainer.algorithm.settings)
    if batch.ref_logprobs is not None:
        kl = sequence_kl(old, batch.ref_logprobs, batch.action_mask)
        metrics["policy/kl"] = kl.mean().item()
    if batch.values is not None:
        explained = explained_variance(
            batch.values, batch.require("returns"), batch.require("loss_mask")
        )
        if math.isfinite(explained):  # it is nan if all returns are equal
            metrics["value/explained_variance"] = explained
    return batch, metrics


def _collate_and_compute_logprobs(
    trainer: OnlineTrainerParts, rollouts: Sequence[Rollout], rewards: Sequence[Sequence[float]]
) -> TrainingBatch:
    """Collate rollouts and compute log-probabilities, values, bootstrap values and entropy.

    The micro-batches are divided among the processes, and every process receives all results. The
    entropy is computed only for micro-batches that contain a rollout whose transcript is written.
    """
    policy, reference, config = trainer.policy, trainer.reference, trainer.config
    pad_id = policy.tokenizer.pad_token_id
    batch = collate(rollouts, rewards, pad_id=pad_id, device=policy.device)
    old = torch.zeros(batch.tokens.shape, dtype=policy.logprob_dtype, device=policy.device)
    values, ref, entropy = (torch.zeros_like(old) for _ in range(3))
    last_values = torch.zeros(len(batch), dtype=policy.logprob_dtype, device=policy.device)
    all_rows = group_into_micro_batches(
        batch.tokens,
        batch.attention_mask,
        range(len(batch)),
        max_tokens=config.micro_batch_tokens,
        packed=policy.packs_rows(batch.attention_mask.sum(1)),
    )
    for rows, weight in trainer.world.own_micro_batches_with_weights(all_rows):
        micro_batch = batch.select(torch.tensor(rows, device=policy.device))
        inputs = (micro_batch.tokens, micro_batch.attention_mask, micro_batch.action_mask)
        width = micro_batch.tokens.shape[1]
        with trainer.stopwatch("scoring"):
            scored = policy.score(
                *inputs,
                temperature=config.rollout.temperature,
                with_entropy=min(rows) < config.samples_per_step,
            )
        ref_logprobs = None
        if reference is not None:
            with trainer.stopwatch("reference"):
                ref_logprobs = reference.logprobs(*inputs, temperature=config.rollout.temperature)
        if not weight:
            continue
        old[rows, :width] = scored.logprobs
        entropy[rows, :width] = scored.entropy
        if scored.values is not None and scored.last_value is not None:
            values[rows, :width] = scored.values
            last_values[rows] = scored.last_value
        if ref_logprobs is not None:
            ref[rows, :width] = ref_logprobs
    trainer.world.all_reduce((old, values, last_values, ref, entropy))
    batch = replace(batch, old_logprobs=old, entropy=entropy)
    if reference is not None:
        batch = replace(batch, ref_logprobs=ref)
    if policy.value_head is not None:
        bootstrap = torch.where(batch.require("truncated"), last_values, 0.0)
        batch = replace(batch, values=values, bootstrap=bootstrap)
    return batch
