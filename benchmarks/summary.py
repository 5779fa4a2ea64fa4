"""From timed steps to medians, and to ratios of steps that stood side by side."""

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
    others: float | None  # cores that other processes used meanwhile
    peak_gib: float | None

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.work / self.seconds

    def disturbed(self, limit: float) -> bool:
        """Whether others used more than ``limit`` of a core."""
        return self.others is not None and self.others > limit


Round = Mapping[str, Step]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third; of a single value, the value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def summarise(steps: Sequence[Step], limit: float) -> dict[str, Any]:
    """Medians and quartiles of the undisturbed steps of one side; of all if none was."""
    kept = [step for step in steps if not step.disturbed(limit)]
    used = kept or steps
    seconds = [step.seconds for step in used]
    low, high = quartiles(seconds)
    peaks = [step.peak_gib for step in steps if step.peak_gib is not None]
    return {
        "seconds": median(seconds),
        "seconds_quartiles": [low, high],
        "rate": median(step.rate for step in used),
        "work": median(step.work for step in used),
        "peak_gib": max(peaks) if peaks else None,
        "kept": len(kept),
        "dropped": len(steps) - len(kept),
        "steps": [[round(s.seconds, 4), s.work, _rounded(s.others)] for s in steps],
    }


def ratios(rounds: Sequence[Round], limit: float) -> dict[str, Any]:
    """How many times as fast as each other side the first one is.

    ``speed`` is the ratio of the medians of work per second; the quartiles are those of the ratios
    within rounds, in which both steps were undisturbed and seconds apart. ``interval`` is the 95%
    interval of the geometric mean of those ratios.
    """
    ours, *rest = rounds[0]
    found = {}
    for other in rest:
        clean = [r for r in rounds if not (r[ours].disturbed(limit) or r[other].disturbed(limit))]
        used = clean or rounds
        pairs = [r[ours].rate / r[other].rate for r in used]
        speed = median(r[ours].rate for r in used) / median(r[other].rate for r in used)
        found[other] = {
            "speed": speed,
            "quartiles": list(quartiles(pairs)),
            "interval": _interval(pairs),
            "pairs": len(clean),
            "memory": _share(rounds[-1][ours].peak_gib, rounds[-1][other].peak_gib),
        }
    return found


def _interval(pairs: Sequence[float]) -> list[float] | None:
    """Ends of the 95% interval of a mean ratio; None with fewer than five pairs."""
    found = interval([math.log(ratio) for ratio in pairs], kind="mean")
    return [math.exp(found.low), math.exp(found.high)] if found.known else None


def enough(rounds: Sequence[Round], wanted: int, limit: float) -> bool:
    """Whether ``wanted`` undisturbed rounds are there, or twice as many were tried."""
    clean = sum(not any(step.disturbed(limit) for step in r.values()) for r in rounds)
    return clean >= wanted or len(rounds) >= 2 * wanted


def _share(ours: float | None, other: float | None) -> float | None:
    return None if ours is None or other is None else ours / other


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
