"""Compute the confidence interval of a mean, given values and their independent units."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rlhf.stats.means import SKEW_CORRECTED_T, bounds_from, moments_of
from rlhf.stats.result import Interval
from rlhf.stats.shares import EXACT_LABEL, is_share, mid_p_bounds, share_interval
from rlhf.stats.units import (
    FEWEST_EFFECTIVE,
    cluster_index,
    effective_units,
    finite_vector,
    no_interval_reason,
    require_equal_length,
)

Kind = Literal["auto", "share", "mean", "count"]

EQUAL_COUNTS_LABEL = "exact (Poisson), equal counts"

_FEWEST_OUTCOMES = 10
"""Smallest number of outcomes of which two values are treated as the only possible ones."""


def interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    *,
    kind: Kind = "auto",
    bounds: tuple[float, float] | None = None,
    weigh: Literal["units", "values"] = "units",
    level: float = 0.95,
) -> Interval:
    """Return the mean of `values` with a confidence interval over independent units.

    * A share has an exact interval for any number of units. If each unit is a mean of several
    samples, the interval of a mean is used instead if it is narrower, clipped to [0, 1].
    * Any other mean has Student's t interval, corrected for skewness. This interval requires five
    units, and five units that differ from the most common value, because otherwise the spread is
    unknown.
    * The mean of counts that all have their smallest possible value has an exact (Poisson)
      interval.

    Args:
        values: [n] finite numbers.
        clusters: [n] independent unit of each value, such as its prompt, start state or seed; by
            default every value is a unit.
        kind: "share" for outcomes in [0, 1], "count" for whole numbers, "mean" for anything else;
            "auto" treats values that are all 0 or 1 as a share.
        bounds: smallest and largest possible value, if known.
        weigh: "units" or "values": the elements that have equal weight in the mean.
        level: confidence level.

    Raises:
        ValueError: there are no values, some are not finite or outside `bounds`, or the number of
            clusters differs.
    """
    data = finite_vector(values)
    if kind == "auto":
        kind = "share" if bounds is None and is_share(data) else "mean"
    low, high = (0.0, 1.0) if kind == "share" and bounds is None else bounds or (-np.inf, np.inf)
    if data.min() < low or data.max() > high:
        raise ValueError(f"values must lie in [{low}, {high}], got {data.min()} to {data.max()}")
    units, sizes = _units(data, clusters, weigh)
    point = float(data.mean() if weigh == "values" else units.mean())
    if kind == "count" and (exact := _count_interval(data, units, low, high, level)):
        return exact
    outcomes: tuple[float, float] | None = None
    if np.isfinite([low, high]).all() and high > low:
        outcomes = low, high
    elif kind != "count":
        outcomes = _two_values(data)
    if outcomes and (exact := _share_interval(point, units, sizes, *outcomes, level)):
        return exact
    estimate = _mean_interval(point, units - point, sizes, level)
    if not estimate.known:
        return estimate
    return replace(estimate, low=max(low, estimate.low), high=min(high, estimate.high))


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, *, level: float = 0.95
) -> Interval:
    """Return a ratio of sums over n units, such as nats per token, with its interval.

    The interval is that of a mean of the residuals numerator - ratio * denominator. The
    denominators are positive.
    """
    top, bottom = finite_vector(numerators), finite_vector(denominators)
    ratio = float(top.sum() / bottom.sum())
    return _mean_interval(ratio, (top - ratio * bottom) / bottom.mean(), bottom, level)


def _mean_interval(
    point: float, residuals: np.ndarray, sizes: np.ndarray, level: float
) -> Interval:
    """Return the interval of a mean of n units with weights proportional to `sizes` [n].

    The mean is fitted to large units, whose residuals are therefore too small. They are divided by
    one minus the unit's share, as in the jackknife (MacKinnon & White 1985, HC3), and the degrees
    of freedom are those of the effective number of units.
    """
    n, share = sizes.size, sizes / sizes.sum()
    if missing := no_interval_reason(point + residuals):
        return Interval.without(point, n, missing)
    effective = effective_units(sizes)
    if effective < FEWEST_EFFECTIVE:
        return Interval.without(point, n, f"the largest of {n} units has {share.max():.0%} of all")
    moments = moments_of(residuals * (1 - 1 / n) / (1 - share))
    moments = moments._replace(mean=np.asarray(point), freedom=np.asarray(effective - 1))
    low, high = bounds_from(moments, level=level)
    return Interval(point, float(low), float(high), n, SKEW_CORRECTED_T)


def _share_interval(
    point: float, units: np.ndarray, sizes: np.ndarray, low: float, high: float, level: float
) -> Interval | None:
    """Return the exact interval of outcomes in [low, high]; None if that of a mean is used."""
    shares = (units - low) / (high - low)
    # Values of one cluster may be equal, so unequal clusters are replaced by fewer equal ones.
    effective = effective_units(sizes)
    if not is_share(shares) and not no_interval_reason(units) and effective >= FEWEST_EFFECTIVE:
        return None
    share = min(1.0, max(0.0, (point - low) / (high - low)))
    ends = mid_p_bounds(share * effective, effective, level=level)
    scaled = (low + (high - low) * float(end) for end in ends)
    return Interval(point, *scaled, units=units.size, method=EXACT_LABEL)


def _count_interval(
    data: np.ndarray, units: np.ndarray, low: float, high: float, level: float
) -> Interval | None:
    """Return the exact interval of counts that are all `low`, or all `low` or one more.

    Equal counts above `low`, such as replies that all have the maximum length, have no interval:
    how far others lie below is unknown.
    """
    least, most = float(data.min()), float(data.max())
    point = float(units.mean())
    if least == most == low:
        # Upper bound of a Poisson mean after n counts of 0, with the mid-p correction.
        step = -math.log(1 - level) / units.size
        ends = max(low, point - step), min(high, point + step)
        return Interval(point, *ends, units=units.size, method=EQUAL_COUNTS_LABEL)
    if least != low or most - least != 1 or not no_interval_reason(units):
        return None
    return share_interval(float((units - least).sum()), units.size, level=level).scaled(1.0, least)


def _two_values(data: np.ndarray) -> tuple[float, float] | None:
    """Return the only two values of many outcomes, if each occurs at least twice.

    Few outcomes often have two values by chance, although more are possible.
    """
    distinct, counts = np.unique(data, return_counts=True)
    if data.size < _FEWEST_OUTCOMES or distinct.size != 2 or counts.min() < 2:
        return None
    return float(distinct[0]), float(distinct[1])


def _units(
    data: np.ndarray, clusters: Sequence[Hashable] | np.ndarray | None, weigh: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return one value for each independent unit, and its weight in the mean."""
    if clusters is None:
        return data, np.ones(data.size)
    require_equal_length(data, clusters)
    _, codes = cluster_index(clusters)
    sums, sizes = np.bincount(codes, weights=data), np.bincount(codes).astype(float)
    if weigh == "units" or sizes.min() == sizes.max():
        return sums / sizes, np.ones(sizes.size)
    mean = data.mean()
    return mean + (sums - mean * sizes) / sizes.mean(), sizes
