"""Compute the confidence interval of a mean, given values and their independent units."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rlhf.stats.means import SKEW_CORRECTED_T, mean_moments, skew_corrected_t_bounds
from rlhf.stats.result import Interval
from rlhf.stats.shares import (
    EXACT_LABEL,
    is_binary,
    mid_p_bounds,
    two_frequent_values,
)
from rlhf.stats.units import (
    FEWEST_EFFECTIVE,
    FEWEST_UNITS,
    distinct_clusters_and_index,
    effective_number_of_units,
    no_interval_reason,
    require_equal_length,
    require_finite_vector,
)

Kind = Literal["share", "mean", "count"]

_MIN_DEGREES_OF_FREEDOM = 0.7
"""Minimum degrees of freedom; the quantile of Student's t is infinite for 0."""

_FEWEST_UNITS_OF_UNEQUAL_SIZE = 50
"""Minimum number of units for the interval of a ratio whose denominators differ. With fewer units,
the coverage is below 90% if the logarithms of the denominators have a standard deviation of 1.5 and
the numerator grows faster than the denominator, because samples often lack the largest units."""


def interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    *,
    kind: Kind = "mean",
    bounds: tuple[float, float] | None = None,
    weigh: Literal["units", "values"] = "units",
    level: float = 0.95,
) -> Interval:
    """Return the mean of `values` with a confidence interval over independent units.

    * If the value of each unit is one of the two `bounds` (0 or 1 for a proportion), the interval
      is exact (binomial with the mid-p correction), for any number of units. If at least ten values
      that are not counts have only two distinct values, each at least twice, and no finite bounds
      are given, these two values are used as the bounds.
    * If units have other values inside known bounds, such as the mean of several samples, the
      interval is that of a mean, clipped to the bounds. If there are too few units for the interval
      of a mean, the exact interval is used, which is valid but wider.
    * For any other mean, the interval is Student's t interval, corrected for skewness. It requires
      at least five units. At least five units must also differ from the most common value, because
      otherwise the variance cannot be estimated. With fewer than ten units, half of them must
      differ.
    * If all values are equal, there is no interval, except for known finite bounds. Counts that
      are all 0, or all 0 and 1, may be large in a few other units. Without a known largest count,
      they therefore have only the interval of a mean.

    Args:
        values: Finite numbers, [n].
        clusters: Independent unit of each value, such as its prompt, start state or seed, [n]; by
            default every value is a unit.
        kind: "share" for a proportion of outcomes in [0, 1], "count" for whole numbers, "mean" for
            other values.
        bounds: Smallest and largest possible value, if they are known; by default 0 and 1 for the
            kind "share".
        weigh: "units" gives each unit the same weight in the mean; "values" gives each value the
            same weight.
        level: Confidence level.

    Raises:
        ValueError: There are no values, some values are not finite or outside `bounds`, or the
            numbers of values and clusters differ.
    """
    data = require_finite_vector(values)
    low, high = (0.0, 1.0) if kind == "share" and bounds is None else bounds or (-np.inf, np.inf)
    if data.min() < low or data.max() > high:
        raise ValueError(f"values must lie in [{low}, {high}], got {data.min()} to {data.max()}")
    units, sizes = _unit_means_and_weights(data, clusters, weigh)
    point = float(data.mean() if weigh == "values" else units.mean())
    if low == high:  # The only possible value.
        return Interval(point, low, high, units.size, EXACT_LABEL)
    outcomes: tuple[float, float] | None = None
    if np.isfinite([low, high]).all():
        outcomes = low, high
    elif kind != "count":
        outcomes = two_frequent_values(data)
    if outcomes and (exact := _exact_interval(point, units, sizes, *outcomes, level)):
        return exact
    estimate = weighted_mean_interval(point, units, sizes, level)
    if not estimate.known:
        return estimate
    return replace(estimate, low=max(low, estimate.low), high=min(high, estimate.high))


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, *, level: float = 0.95
) -> Interval:
    """Return sum(numerators) / sum(denominators), such as nats per token, with its interval.

    Both arguments have one value for each of n units, [n]. The denominators must be positive. The
    width of the interval is that of a mean of the residuals (numerator - ratio * denominator) /
    mean(denominators). It requires 50 units, or five units with equal denominators.

    Raises:
        ValueError: An argument is empty, or contains values that are not finite.
    """
    top, bottom = require_finite_vector(numerators), require_finite_vector(denominators)
    ratio, n = float(top.sum() / bottom.sum()), bottom.size
    if FEWEST_UNITS <= n < _FEWEST_UNITS_OF_UNEQUAL_SIZE and bottom.min() < bottom.max():
        needs = f"{n} units of different sizes, an interval needs {_FEWEST_UNITS_OF_UNEQUAL_SIZE}"
        return Interval.without_bounds(ratio, n, needs)
    return weighted_mean_interval(ratio, top / bottom, bottom, level)


def weighted_mean_interval(
    point: float, unit_values: np.ndarray, weights: np.ndarray, level: float
) -> Interval:
    """Return the interval of the mean of `unit_values` [n] with `weights` [n].

    `point` is the mean. The residual of a unit is its weighted deviation from the mean. Units
    with a large weight have a large influence on the mean, so their residuals are too small.
    Residuals are therefore divided by one minus the unit's fraction of the total weight, as in the
    jackknife (MacKinnon & White 1985, HC3). The degrees of freedom are Satterthwaite's for
    residuals whose standard deviation is proportional to the weight. There is no interval if
    `no_interval_reason` gives a reason, or if the effective number of units is below
    `FEWEST_EFFECTIVE`.
    """
    n, share = weights.size, weights / weights.sum()
    if missing := no_interval_reason(unit_values, weights):
        return Interval.without_bounds(point, n, missing)
    effective = effective_number_of_units(weights)
    if effective < FEWEST_EFFECTIVE:
        return Interval.without_bounds(
            point, n, f"the largest of {n} units has {share.max():.0%} of the total weight"
        )
    residuals = (unit_values - point) * weights / weights.mean()
    moments = mean_moments(residuals * (1 - 1 / n) / (1 - share))
    moments = moments._replace(
        mean=np.asarray(point), freedom=np.asarray(_degrees_of_freedom(weights))
    )
    low, high = skew_corrected_t_bounds(moments, level=level)
    return Interval(point, float(low), float(high), n, SKEW_CORRECTED_T)


def _degrees_of_freedom(weights: np.ndarray) -> float:
    """Return Satterthwaite's degrees of freedom of the mean of units with `weights` [n]."""
    return max(_MIN_DEGREES_OF_FREEDOM, effective_number_of_units(weights**2) - 1)


def _exact_interval(
    point: float,
    unit_values: np.ndarray,
    weights: np.ndarray,
    low: float,
    high: float,
    level: float,
) -> Interval | None:
    """Return the exact interval of a mean of outcomes in [low, high].

    The result is None if some units are strictly between `low` and `high` and the interval of a
    mean exists. `unit_values` [n] are the values of the units, and `weights` [n] their weights.
    """
    shares = (unit_values - low) / (high - low)
    # Values of one cluster may be equal, so clusters of different sizes count as fewer units.
    effective = effective_number_of_units(weights)
    if (
        not is_binary(shares)
        and not no_interval_reason(unit_values, weights)
        and effective >= FEWEST_EFFECTIVE
    ):
        return None
    share = min(1.0, max(0.0, (point - low) / (high - low)))
    ends = mid_p_bounds(share * effective, effective, level=level)
    scaled = (low + (high - low) * float(end) for end in ends)
    return Interval(point, *scaled, units=unit_values.size, method=EXACT_LABEL)


def _unit_means_and_weights(
    data: np.ndarray, clusters: Sequence[Hashable] | np.ndarray | None, weigh: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the weight of each of C independent units, both [C].

    If `weigh` is "values" and the clusters have different sizes, the weights are the sizes;
    otherwise they are 1.
    """
    if clusters is None:
        return data, np.ones(data.size)
    require_equal_length(data, clusters)
    _, codes = distinct_clusters_and_index(clusters)
    sums, sizes = np.bincount(codes, weights=data), np.bincount(codes).astype(float)
    has_equal_weights = weigh == "units" or sizes.min() == sizes.max()
    return sums / sizes, np.ones(sizes.size) if has_equal_weights else sizes
