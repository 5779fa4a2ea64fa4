"""Build the micro-batches of a planned run from its data, or from random replies."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlhf.algorithms.batch import TrainingBatch
from rlhf.rollout.batch import collate as collate_rollouts
from rlhf.rollout.sampling.base import Completion, FinishReason, Request
from rlhf.training.batching import group_into_micro_batches
from rlhf.training.optimize import shuffle_into_mini_batches
from rlhf.training.supervised import SupervisedTrainer, collate_examples

SAMPLED_STEPS = 32
"""Maximum number of steps of an offline run whose batches are read."""
SAMPLED_EPISODES = 256
"""Maximum number of episodes that are played with random replies, unless one group is larger."""


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of some training steps, over all processes."""

    steps: list[list[TrainingBatch]]
    """Micro-batches of the updates of each step, in one epoch over its batch."""
    scoring: list[TrainingBatch]
    """Micro-batches of the passes without gradients of one step."""
    sampled_tokens: float = 0.0
    """Number of tokens that one step samples."""
    prompt_tokens: float = 0.0
    """Number of tokens that one step reads without sampling them. The equal prompts of a group
    count once."""
    longest: int = 0
    """Number of tokens of the longest episode; 0 for an offline run."""

    def all_update_micro_batches(self) -> list[TrainingBatch]:
        """Return the micro-batches of the updates of all steps."""
        return [micro_batch for step in self.steps for micro_batch in step]


def offline_batches(trainer: SupervisedTrainer) -> StepBatches:
    """Return the micro-batches of the first steps of an offline run.

    Streamed examples are taken from the trainer's stream.
    """
    config, steps = trainer.config, []
    max_tokens = config.micro_batch_size * config.max_length
    for step in range(min(SAMPLED_STEPS, trainer.num_steps)):
        if trainer.stream is None:
            examples = [
                trainer.examples["train"][row] for row in trainer.schedule.example_indices(step)
            ]
        else:
            examples = trainer.stream.take(config.batch_size)
        batch = collate_examples(
            examples,
            pad_id=trainer.model.tokenizer.pad_token_id,
            device=trainer.model.device,
            with_margins=trainer.with_margins,
        )
        steps.append(_micro_batches(trainer.model, batch, max_tokens=max_tokens))
    return StepBatches(steps, steps[0])


class RandomReplyEngine:
    """``RolloutEngine`` that answers with ``max_new_tokens`` random tokens."""

    def __init__(self, vocabulary: int, *, excluded: Sequence[int], seed: int) -> None:
        self.policy_version = 0
        allowed = np.setdiff1d(np.arange(vocabulary), np.array(sorted(excluded), dtype=np.int64))
        self._allowed, self._rng = allowed, np.random.default_rng(seed)
        self._requests: list[Request] = []

    def update_policy(self, version: int) -> None:
        """Set the version of the policy."""
        self.policy_version = version

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests."""
        self._requests += requests

    def poll(self) -> list[Completion]:
        """Return a completion for every request."""
        requests, self._requests = self._requests, []
        return [
            Completion(
                request,
                self._rng.choice(self._allowed, request.max_new_tokens).tolist(),
                [0.0] * request.max_new_tokens,
                FinishReason.LENGTH,
                self.policy_version,
            )
            for request in requests
        ]

    def release(self, episode_id: int) -> None:
        """Cancel the request of an episode."""
        self._requests = [r for r in self._requests if r.episode_id != episode_id]

    def reset(self) -> None:
        """Cancel all requests."""
        self._requests = []


def num_sampled_groups(trainer: Any) -> int:
    """Return the number of groups of episodes that `play_and_make_online_batches` plays."""
    size = trainer.algorithm.settings.group_size
    return min(trainer.config.episodes_per_step, max(size, SAMPLED_EPISODES)) // size


def play_and_make_online_batches(trainer: Any) -> StepBatches:
    """Play episodes with random replies, and return the micro-batches of one step of training.

    Args:
        trainer: An ``OnlineTrainer``, which must not train afterwards.
    """
    config, settings = trainer.config, trainer.algorithm.settings
    policy, collector = trainer.policy, trainer.collector
    size, groups = settings.group_size, num_sampled_groups(trainer)
    repeats = -(-config.episodes_per_step // (groups * size))
    collector.engine = RandomReplyEngine(
        len(policy.tokenizer), excluded=sorted(collector.chat_format.stop_ids), seed=config.seed
    )
    rollouts = collector.collect(trainer.starts.take_episode_seeds(config.seed, groups, size))
    rollouts = (rollouts * repeats)[: config.episodes_per_step]
    batch = collate_rollouts(
        rollouts,
        [rollout.env_rewards for rollout in rollouts],
        pad_id=policy.tokenizer.pad_token_id,
        device=policy.device,
    )
    batch = replace(
        batch, loss_mask=batch.action_mask, pair_ids=torch.arange(len(batch), device=policy.device)
    )
    split = functools.partial(_micro_batches, policy, max_tokens=config.micro_batch_tokens)
    rng = np.random.default_rng([config.seed, 0])
    updates = [
        micro_batch
        for rows in shuffle_into_mini_batches(batch, settings.num_minibatches, rng)
        for micro_batch in split(batch.select(rows.to(policy.device)))
    ]
    sampled = int(batch.action_mask.sum())
    # The engine computes equal prompts of a group once, and every later token once.
    firsts = {r.group_index: r.is_action.index(True) for r in rollouts}
    later = sum(len(r.tokens) - r.num_sampled_tokens - firsts[r.group_index] for r in rollouts)
    read = sum(firsts.values()) * (len(rollouts) / (len(firsts) * size)) + later
    return StepBatches(
        [updates],
        split(batch),
        sampled,
        read,
        max(len(rollout.tokens) for rollout in rollouts),
    )


def _micro_batches(model: Any, batch: TrainingBatch, *, max_tokens: int) -> list[TrainingBatch]:
    """Return the micro-batches of a batch, as in training.

    Args:
        model: Policy or reward model in training.
        batch: The batch, with ``pair_ids``.
        max_tokens: Maximum number of tokens of a micro-batch.
    """
    indices = group_into_micro_batches(
        batch.tokens,
        batch.attention_mask,
        batch.require("pair_ids").tolist(),
        max_tokens=max_tokens,
        packed=model.packs_rows(batch.attention_mask.sum(1)),
    )
    return [batch.select(torch.tensor(rows, device=batch.tokens.device)) for rows in indices]
