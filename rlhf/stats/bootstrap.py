"""Bootstrap intervals of statistics that are no means."""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from rlhf.stats.interval import fewest_needed
from rlhf.stats.result import Interval


def stretched_interval(
    point: float, replicates: np.ndarray, units: int, freedom: float, level: float = 0.95
) -> Interval:
    """Percentile interval of bootstrap `replicates` [repetitions] of an estimate from `units`.

    A percentile interval over 5 units covers 83 to 91%. It is widened about the point by
    sqrt(n / (n - 1)) t / z, which for a mean of one task gives the t interval; `freedom` are the
    degrees of freedom of t. Fewer than five units have no interval.
    """
    if missing := fewest_needed(units):
        return Interval.without(point, units, missing)
    tail = (1 + level) / 2
    stretch = math.sqrt(units / (units - 1)) * special.stdtrit(freedom, tail) / special.ndtri(tail)
    low, high = np.quantile(replicates, [1 - tail, tail])
    return Interval(
        float(point),
        float(point - stretch * (point - low)),
        float(point + stretch * (high - point)),
        units,
        "bootstrap, stretched",
    )
