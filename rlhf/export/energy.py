"""Estimate the duration and the energy of training from the records of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.common.numbers import is_number
from rlhf.evaluation.records import RunRecord

_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class TrainingCost:
    """Time, tokens and devices of one training run."""

    seconds: float
    """Duration of training, see `RunRecord.training_seconds`."""
    tokens: int | None
    """Number of tokens of the training examples (offline) or number of sampled tokens (online);
    None if it was not logged."""
    processes: int
    """Number of processes; each one uses one device."""
    device: str
    """Name of the GPU, or of the processor if no GPU was recorded; "" if it is unknown."""
    watts: float | None
    """Sum of the power limits of the GPUs in use; None if one of them was not recorded."""


@dataclass(frozen=True)
class EnergyEstimate:
    """Energy of all runs of a model, with the assumed power."""

    kilowatt_hours: float
    watts: tuple[float, ...]
    """Assumed power of each run."""
    is_recorded: bool
    """Whether the power is the power limit of the GPUs, which the runs recorded. Otherwise, the
    power was given for the export."""


def training_cost(record: RunRecord) -> TrainingCost:
    """Return the cost of a run from its `metrics.jsonl` and `environment.json`."""
    machine = record.environment
    processes = int(machine.get("processes") or 1)
    gpus = [gpu for gpu in machine.get("gpus") or [] if isinstance(gpu, dict)][:processes]
    limits: list[Any] = [gpu.get("power_limit_watts") for gpu in gpus]
    known = [float(limit) for limit in limits if is_number(limit)]
    return TrainingCost(
        seconds=record.training_seconds,
        tokens=_number_of_tokens(record),
        processes=processes,
        device=str(gpus[0].get("name") if gpus else machine.get("processor") or ""),
        watts=sum(known) if gpus and len(known) == processes else None,
    )


def _number_of_tokens(record: RunRecord) -> int | None:
    """Return the number of tokens of a run, see `TrainingCost.tokens`."""
    _, logged = record.series("train/tokens")
    if logged:
        return round(sum(logged))
    _, means = record.series("rollout/tokens")
    episodes: Any = record.config.get("episodes_per_step")
    return round(sum(means) * episodes) if means and is_number(episodes) else None


def estimate_energy(
    costs: Sequence[TrainingCost], power_watts: float | None
) -> EnergyEstimate | None:
    """Return the product of time and power, summed over runs; None without runs or a known power.

    Args:
        costs: Costs of the runs.
        power_watts: Power of every run in watts. By default, the recorded limits are used. They
            give an upper bound on the energy of the GPUs.
    """
    limits = [power_watts or cost.watts for cost in costs]
    watts = tuple(limit for limit in limits if limit is not None)
    if not costs or len(watts) < len(costs):
        return None
    joules = sum(cost.seconds * power for cost, power in zip(costs, watts, strict=True))
    return EnergyEstimate(joules / _JOULES_PER_KWH, watts, is_recorded=power_watts is None)
