"""Access to the logged metrics of a run, for the report and for the alarms during training."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from rlhf.common.numbers import is_number
from rlhf.common.score_names import GOLD

_RETURN_KEYS = ("eval/return", "eval/env", "reward/env")
"""Keys of the metrics of the return of the environment."""
CHECKED_KEYS = (
    "eval/loss",
    "groups/all_solved",
    "groups/equal",
    "groups/none_solved",
    "policy/clip_fraction_negative",
    "policy/clip_fraction_positive",
    "policy/entropy",
    "policy/kl",
    "policy/ratio_max",
    "reward/mean",
    "reward/unscored",
    "rewards/std",
    "rollout/evasion_gain",
    "rollout/invalid",
    "rollout/length_limited",
    "rollout/missing_eos",
    "rollout/repetition",
    "rollout/success",
    "rollout/tokens",
    "rollout/truncated",
    "rollout/turns",
    "sampler/ess",
    "train/grad_norm",
    "train/moved",
    "train/no_gradient",
    "train/updates",
    "value/explained_variance",
)
"""Keys of the metrics whose series the alarms read, besides the gold score."""
NUM_RECENT = 5
"""Number of last logged values whose mean represents the end of training."""


@dataclass(frozen=True, kw_only=True)
class MetricLog:
    """Logged metrics and configuration of a run."""

    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    """Rows of `metrics.jsonl`."""

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps and the finite values of a metric, in order of step."""
        rows = [row for row in self._ordered_rows if is_number(row.get(key))]
        return [float(row["step"]) for row in rows], [float(row[key]) for row in rows]

    @cached_property
    def _ordered_rows(self) -> list[Mapping[str, Any]]:
        """Rows with a finite step, in order of step."""
        rows = [row for row in self.metrics if is_number(row.get("step"))]
        return sorted(rows, key=lambda row: row["step"])

    def recent_rows(self) -> Sequence[Mapping[str, Any]]:
        """Return the last `NUM_RECENT` rows, whose mean represents the end of training."""
        return self.metrics[-NUM_RECENT:]

    def first_not_finite_steps(self) -> dict[str, int]:
        """Return metric -> first step with a value that is NaN or infinite."""
        first_steps: dict[str, int] = {}
        for row in self.metrics:
            _record_not_finite(row, first_steps)
        return first_steps


class RunningMetricLog(MetricLog):
    """Logged metrics of a run during training, limited to the metrics that the alarms need.

    The metrics are stored in arrays, which need 8 bytes per step and metric. A row of `MetricLog`
    needs about 2.5 kB, which would be too much for a long run.

    Args:
        config: Configuration of the run.
        rows: Rows that were logged before the run was resumed.
    """

    def __init__(self, config: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
        super().__init__(config=config)
        self.length = 0
        """Number of rows."""
        self._columns = {
            key: array("d") for key in ("step", *CHECKED_KEYS, *gold_metric_keys(config))
        }
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=NUM_RECENT)
        self._not_finite: dict[str, int] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a logged row at the end."""
        self.length += 1
        self._recent.append(row)
        _record_not_finite(row, self._not_finite)
        for key, column in self._columns.items():
            column.append(row[key] if is_number(row.get(key)) else math.nan)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps and the finite values of one of `CHECKED_KEYS` or of the gold keys."""
        steps, values = (np.array(self._columns[name]) for name in ("step", key))
        logged = np.flatnonzero(np.isfinite(steps) & np.isfinite(values))
        order = logged[np.argsort(steps[logged], kind="stable")]
        return steps[order].tolist(), values[order].tolist()

    def recent_rows(self) -> Sequence[Mapping[str, Any]]:
        """Return the last `NUM_RECENT` rows."""
        return list(self._recent)

    def first_not_finite_steps(self) -> dict[str, int]:
        """Return metric -> first step with a value that is NaN or infinite."""
        return self._not_finite


def mean_or_zero(values: Sequence[float]) -> float:
    """Return the mean of some values, or 0 without values."""
    return math.fsum(values) / len(values) if values else 0.0


def first_and_last_means(values: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and of the last `NUM_RECENT` values."""
    return mean_or_zero(values[:NUM_RECENT]), mean_or_zero(values[-NUM_RECENT:])


def reward_rose(log: MetricLog) -> bool:
    """Return whether the mean reward of the last logged steps is above that of the first ones.

    A difference within the rounding error does not count. The result is False with fewer than
    `NUM_RECENT` values.
    """
    rewards = log.series("reward/mean")[1]
    first, last = first_and_last_means(rewards)
    return (
        len(rewards) >= NUM_RECENT and last > first and not math.isclose(first, last, rel_tol=1e-6)
    )


def gold_metric_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of the metrics that can be the gold score, in order of preference.

    The first is the sum of the rewards under ``gold``. Runs of earlier versions logged
    only the individual rewards. The return of a prompt dataset is not among the keys, because it is
    always 0.

    Args:
        config: Configuration of a training run, as plain data; only ``gold`` and ``env`` are read.
    """
    names = [str(spec.get("name") or spec.get("kind")) for spec in config.get("gold") or ()]
    named = [f"{split}/{name}" for split in ("eval", "reward") for name in (GOLD, *names)]
    returns = () if (config.get("env") or {}).get("prompts") else _RETURN_KEYS
    return [*named, *returns]


def _record_not_finite(row: Mapping[str, Any], first_steps: dict[str, int]) -> None:
    """Record in ``first_steps`` the step of a row for each metric whose value is not finite.

    An existing entry of a metric, from an earlier row, is not changed.
    """
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            first_steps.setdefault(key, int(row.get("step", 0)))
