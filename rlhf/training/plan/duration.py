"""The duration of a training step, computed from the measured speed of its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.algorithms.batch import TrainingBatch
from rlhf.training.plan.calibration import PassSpeed


@dataclass(frozen=True)
class StepDuration:
    """Seconds of a training step on one process, by part."""

    sampling: float = 0.0
    """Sampling of the completions, with the prefill of the prompts."""
    environments: float = 0.0
    """Calls of the environments."""
    rewards: float = 0.0
    """Forward passes of learned rewards."""
    scoring: float = 0.0
    """Forward passes without gradients: log-probabilities of policy and reference, and values."""
    passes: float = 0.0
    """Forward and backward passes of the updates."""
    optimizer: float = 0.0
    """Optimizer steps, with the norm of the gradients."""
    communication: float = 0.0
    """Collective operations with other processes."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(dataclasses.astuple(self))


def passes_seconds(
    micro_batches: Sequence[TrainingBatch],
    speed: PassSpeed,
    *,
    count_tokens: Callable[[TrainingBatch], int],
    processes: int,
) -> float:
    """Return the duration of the passes over micro-batches that are shared by processes.

    Every process takes every ``processes``-th micro-batch, as in training. The slowest process
    determines the duration.
    """
    shares = [micro_batches[rank::processes] for rank in range(processes)]
    return max(
        sum(speed.seconds(count_tokens(batch), int(batch.action_mask.sum())) for batch in share)
        for share in shares
    )


def sampling_seconds(
    *,
    sampled_tokens: float,
    rows: int,
    step_seconds: float,
    prompt_tokens: float,
    speed: PassSpeed,
) -> float:
    """Return the duration of sampling in one process.

    Args:
        sampled_tokens: Number of tokens that the process samples.
        rows: Number of rows that are decoded together. Rows that end are replaced, so that every
            step decodes this number of tokens.
        step_seconds: Seconds of a decoding step of these rows.
        prompt_tokens: Number of tokens that are read without being sampled.
        speed: Speed of a forward pass.
    """
    return sampled_tokens / rows * step_seconds + speed.seconds(prompt_tokens, 0)
