"""Summarize timed steps: medians, and ratios of steps of the same round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from rlhf.stats import interval


@dataclass(frozen=True)
class Step:
    """One timed step of one side."""

    seconds: float
    work: float
    others: float | None  # number of cores that other processes used during the step
    peak_gib: float | None

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.work / self.seconds

    def disturbed(self, limit: float) -> bool:
        """Whether other processes used more than ``limit`` cores."""
        return self.others is not None and self.others > limit


Round = Mapping[str, Step]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile; both are the value if there is only one."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def summarize(steps: Sequence[Step], limit: float) -> dict[str, Any]:
    """Return medians and quartiles of a side's undisturbed steps, or of all steps if none is."""
    undisturbed = [step for step in steps if not step.disturbed(limit)]
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


def ratios(rounds: Sequence[Round], limit: float) -> dict[str, Any]:
    """Return the speed of the first side relative to each other side.

    ``speed`` is the ratio of the median work per second. ``quartiles`` are those of the ratios
    within rounds in which both steps were undisturbed, and ``interval`` is the 95% interval of the
    geometric mean of these ratios.
    """
    ours, *rest = rounds[0]
    by_side = {}
    for other in rest:
        clean = [r for r in rounds if not (r[ours].disturbed(limit) or r[other].disturbed(limit))]
        used = clean or rounds
        pairs = [r[ours].rate / r[other].rate for r in used]
        speed = median(r[ours].rate for r in used) / median(r[other].rate for r in used)
        by_side[other] = {
            "speed": speed,
            "quartiles": list(quartiles(pairs)),
            "interval": _interval(pairs),
            "pairs": len(clean),
            "memory": _share(rounds[-1][ours].peak_gib, rounds[-1][other].peak_gib),
        }
    return by_side


def _interval(pairs: Sequence[float]) -> list[float] | None:
    """Return the ends of the 95% interval of a mean ratio; None for fewer than five pairs."""
    estimate = interval([math.log(ratio) for ratio in pairs], kind="mean")
    return [math.exp(estimate.low), math.exp(estimate.high)] if estimate.known else None


def enough(rounds: Sequence[Round], wanted: int, limit: float) -> bool:
    """Return whether ``wanted`` rounds are undisturbed, or twice as many were run."""
    clean = sum(not any(step.disturbed(limit) for step in r.values()) for r in rounds)
    return clean >= wanted or len(rounds) >= 2 * wanted


def _share(ours: float | None, other: float | None) -> float | None:
    return None if ours is None or other is None else ours / other


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
