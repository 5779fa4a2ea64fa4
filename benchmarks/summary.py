"""Summarize timed steps: medians of each side, and speed ratios of sides in the same round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from rlhf.stats import interval


@dataclass(frozen=True)
class TimedStep:
    """One timed step of one side."""

    seconds: float
    work: float
    """Amount of work, in the workload's unit."""
    others: float | None
    """Number of cores that other processes used during the step; None if unknown."""
    peak_gib: float | None
    """Peak memory of the process until the end of the step, in GiB; None if unknown."""

    @property
    def rate(self) -> float:
        """Amount of work per second."""
        return self.work / self.seconds

    def is_disturbed(self, max_other_cores: float) -> bool:
        """Return whether other processes used more than ``max_other_cores`` cores."""
        return self.others is not None and self.others > max_other_cores


Round = Mapping[str, TimedStep]
"""Side -> its step in the round."""


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile; for a single value, return this value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def summarize(steps: Sequence[TimedStep], max_other_cores: float) -> dict[str, Any]:
    """Return medians and quartiles of the undisturbed steps of a side.

    If all steps were disturbed, all steps are used. ``max_other_cores`` is the argument of
    `TimedStep.is_disturbed`.
    """
    undisturbed = [step for step in steps if not step.is_disturbed(max_other_cores)]
    used = undisturbed or steps
    seconds = [step.seconds for step in used]
    low, high = quartiles(seconds)
    peaks = [step.peak_gib for step in steps if step.peak_gib is not None]
    return {
        "seconds": median(seconds),
        "seconds_quartiles": [low, high],
        "rate": median(step.rate for step in used),
        "work": median(step.work for step in used),
        "peak_gib": max(peaks) if peaks else None,
        "kept": len(undisturbed),
        "dropped": len(steps) - len(undisturbed),
        "steps": [[round(s.seconds, 4), s.work, _rounded(s.others)] for s in steps],
    }


def speed_ratios(rounds: Sequence[Round], max_other_cores: float) -> dict[str, Any]:
    """Return the speed of the first side relative to each other side.

    Only rounds in which the steps of both sides were undisturbed are used. If there is no such
    round, all rounds are used.

    Returns:
        Other side -> results. ``speed`` is the ratio of the medians of work per second.
        ``quartiles`` are the quartiles of the ratios within rounds, and ``interval`` is the 95%
        interval of the geometric mean of these ratios. ``pairs`` is the number of undisturbed
        rounds. ``memory`` is the ratio of the peak memories.
    """
    ours, *rest = rounds[0]
    by_side = {}
    for other in rest:
        clean = [
            r
            for r in rounds
            if not (r[ours].is_disturbed(max_other_cores) or r[other].is_disturbed(max_other_cores))
        ]
        used = clean or rounds
        pairs = [r[ours].rate / r[other].rate for r in used]
        speed = median(r[ours].rate for r in used) / median(r[other].rate for r in used)
        by_side[other] = {
            "speed": speed,
            "quartiles": list(quartiles(pairs)),
            "interval": _geometric_mean_interval(pairs),
            "pairs": len(clean),
            "memory": _memory_ratio(rounds[-1][ours].peak_gib, rounds[-1][other].peak_gib),
        }
    return by_side


def _geometric_mean_interval(ratios: Sequence[float]) -> list[float] | None:
    """Return the bounds of the 95% interval of the geometric mean of ratios.

    The result is None for fewer than five ratios.
    """
    estimate = interval([math.log(ratio) for ratio in ratios], kind="mean")
    return [math.exp(estimate.low), math.exp(estimate.high)] if estimate.known else None


def has_enough_rounds(rounds: Sequence[Round], wanted: int, max_other_cores: float) -> bool:
    """Return whether ``wanted`` rounds were undisturbed, or twice as many rounds were run."""
    clean = sum(not any(step.is_disturbed(max_other_cores) for step in r.values()) for r in rounds)
    return clean >= wanted or len(rounds) >= 2 * wanted


def _memory_ratio(ours: float | None, other: float | None) -> float | None:
    """Return ours / other, or None if a value is unknown."""
    return None if ours is None or other is None else ours / other


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
