"""Intervals of statistics that are no means, from the statistic without each block of units."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import numpy as np
from scipy import special

from rlhf.stats.interval import missing_for
from rlhf.stats.result import Interval

BLOCKS = 100
"""Blocks of units at most: beyond it the interval gains nothing and costs more."""

FEWEST_UNITS = 20
"""Units below which there is no interval: with 10, that of a macro-F1 covers 83%."""

Scale = Literal["identity", "logit", "log", "fisher"]

_SCALES: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "identity": (np.asarray, np.asarray),
    "logit": (special.logit, special.expit),
    "log": (np.log, np.exp),
    "fisher": (np.arctanh, np.tanh),
}


def jackknife(
    statistic: Callable[[np.ndarray], float],
    clusters: Sequence[Hashable] | np.ndarray,
    *,
    scale: Scale = "identity",
    level: float = 0.95,
) -> Interval:
    """A statistic of rows with an interval over clusters: Student's t on jackknife pseudo-values.

    The interval is made on a scale on which the statistic is nearly normal and is mapped back, so
    that it stays inside the statistic's range. At an end of the range (an area of exactly 1), with
    fewer than twenty clusters, or where leaving clusters out changes nothing, there is none.

    Args:
        statistic: from row indices [m] to a number; nan where it is undefined.
        clusters: [n] the independent unit of each row.
        scale: "logit" for shares and areas, "fisher" for correlations, "log" for positive numbers.
        level: of confidence.
    """
    index: dict[Hashable, int] = {}
    codes = np.array([index.setdefault(name, len(index)) for name in clusters], dtype=int)
    units, rows = len(index), np.arange(codes.size)
    point = float(statistic(rows)) if units else float("nan")
    if units < FEWEST_UNITS:
        return Interval.without(point, units, f"{units} units, an interval needs {FEWEST_UNITS}")
    forward, backward = _SCALES[scale]
    # Clusters come in no order that matters: every so manieth one joins a block.
    blocks = codes % min(units, BLOCKS)
    with np.errstate(divide="ignore", invalid="ignore"):
        center = float(forward(point))
        without = np.array(
            [float(forward(statistic(rows[blocks != block]))) for block in range(blocks.max() + 1)]
        )
    if not np.isfinite(center) or not np.isfinite(without).all():
        return Interval.without(point, units, "it is at an end of its range, or is undefined")
    count = without.size
    pseudo = count * center - (count - 1) * without
    if missing := missing_for(pseudo):
        return Interval.without(point, units, missing)
    margin = special.stdtrit(count - 1, (1 + level) / 2) * pseudo.std(ddof=1) / np.sqrt(count)
    low, high = (float(backward(center + side * margin)) for side in (-1, 1))
    return Interval(point, low, high, units, "jackknife over units")


def weighted_sum(parts: Sequence[Interval], weights: Sequence[float]) -> Interval:
    """A sum of independent estimates, each with its own interval: the MOVER of Zou & Donner (2008).

    The distance from the sum to a bound is the root of the summed squares of the parts' distances
    to theirs, so that shares of exactly 0 or 1 keep their doubt.

    Args:
        parts: the estimates; without an interval of each of positive weight the sum has none.
        weights: one each, none negative.
    """
    shares = np.asarray(weights, dtype=float)
    estimates = np.array([part.estimate for part in parts])
    point, units = float(shares @ estimates), sum(part.units for part in parts)
    for part, weight in zip(parts, shares, strict=True):
        if weight > 0 and not part.known:
            return Interval.without(point, units, part.needs)
    below = np.array([part.estimate - part.low for part in parts])
    above = np.array([part.high - part.estimate for part in parts])
    low = point - np.sqrt(((shares * below) ** 2).sum())
    high = point + np.sqrt(((shares * above) ** 2).sum())
    return Interval(point, float(low), float(high), units, "sum of independent intervals")
