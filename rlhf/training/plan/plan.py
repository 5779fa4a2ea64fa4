"""The estimate of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf.training.plan.calibration import PassSpeed
from rlhf.training.plan.duration import StepDuration
from rlhf.training.plan.memory import Memory


@dataclass(frozen=True)
class Parallelism:
    """The processes of a run."""

    processes: int = 1
    """Number of processes, which share the micro-batches of a step."""
    shards: int = 1
    """Number of processes over which weights, gradients and optimizer state are sharded."""
    per_machine: int = 1
    """Number of processes on this machine, between which the communication can be measured."""


@dataclass(frozen=True)
class Plan:
    """The estimated memory and duration of a run, for one process."""

    phases: Mapping[str, Memory]
    """Phase -> memory at its peak, without Python and the libraries."""
    bound: Mapping[str, Memory]
    """The same for the longest examples that the configuration allows; empty if ``phases`` already
    describes them."""
    duration: StepDuration
    """Mean seconds of a step."""
    num_steps: int
    parallelism: Parallelism
    speed: PassSpeed
    """Measured speed of a forward and a backward pass."""
    overhead: float = 0.0
    """Bytes of this process before training, without the tensors of the training state and without
    freed memory: Python and the libraries."""
    assumptions: list[str] = field(default_factory=list)
