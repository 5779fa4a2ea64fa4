"""The one function that makes an interval: from values and their independent units."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rlhf.stats.means import CORRECTED, Moments, bounds_from, mean_bounds
from rlhf.stats.result import Interval
from rlhf.stats.shares import EXACT, is_share, mid_p_bounds, rare_count, share_interval

Kind = Literal["auto", "share", "mean", "count"]

ALL_EQUAL = "exact (Poisson), equal counts"

FEWEST_UNITS = 5
"""Units below which a mean has no interval; as many must differ from what most units have."""


def interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    *,
    kind: Kind = "auto",
    bounds: tuple[float, float] | None = None,
    weigh: Literal["units", "values"] = "units",
    level: float = 0.95,
) -> Interval:
    """The mean of `values` with an interval over independent units.

    * A share has an exact interval at any number of units. Where each unit is a mean of several
      samples and a mean would have an interval, it is that narrower one, inside [0, 1].
    * Another mean needs five units, and five that differ from a value that most units have: what
      was hardly seen to vary has an unknown spread. Its interval is Student's t, corrected for
      skewness.
    * Counts that are all equal have an exact (Poisson) interval for further, unseen counts.

    Args:
        values: [n] finite numbers.
        clusters: [n] the independent unit of each value, such as its prompt, start state or seed;
            without it every value is a unit.
        kind: "share" for outcomes in [0, 1], "count" for whole numbers, "mean" for anything else;
            "auto" takes 0s and 1s for a share.
        bounds: the smallest and the largest possible value, where they are known.
        weigh: whether each unit or each value counts once in the mean.
        level: of confidence.

    Raises:
        ValueError: no values, values that are not finite or lie outside their bounds, or another
            number of clusters.
    """
    data = _vector(values)
    if kind == "auto" and bounds is None:
        kind = "share" if is_share(data) else "mean"
    elif kind == "auto":
        kind = "mean"
    low, high = (0.0, 1.0) if kind == "share" and bounds is None else bounds or (-np.inf, np.inf)
    if data.min() < low or data.max() > high:
        raise ValueError(f"values must lie in [{low}, {high}], got {data.min()} to {data.max()}")
    units, sizes = _units(data, clusters, weigh)
    point = float(data.mean() if weigh == "values" else units.mean())
    if kind == "count" and (found := _steps(data, units, low, high, level)) is not None:
        return found
    if np.isfinite([low, high]).all() and high > low:
        whole = _within(point, units, sizes, low, high, level)
        if whole is not None:
            return whole
    elif kind != "count" and (pair := _two_values(data)) is not None:
        whole = _within(point, units, sizes, *pair, level)
        if whole is not None:
            return whole
    if missing := missing_for(units):
        return Interval.without(point, units.size, missing)
    below, above = mean_bounds(units, level=level)
    return Interval(point, max(low, float(below)), min(high, float(above)), units.size, CORRECTED)


def moment_interval(
    moments: Moments, units: int, *, level: float = 0.95, needs: str = ""
) -> Interval:
    """The interval of a mean from its moments; with `needs` there is none."""
    point = float(moments.mean)
    if missing := needs or fewest_needed(units):
        return Interval.without(point, units, missing)
    low, high = bounds_from(moments, level=level)
    return Interval(point, float(low), float(high), units, CORRECTED)


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, *, level: float = 0.95
) -> Interval:
    """A ratio of two sums over units, such as nats over tokens, with an interval over the units.

    The residuals numerator - ratio * denominator stand for the units (the linearized ratio).

    Args:
        numerators: [n] one for each unit.
        denominators: [n] positive ones.
        level: of confidence.
    """
    top, bottom = _vector(numerators), _vector(denominators)
    ratio = float(top.sum() / bottom.sum())
    residuals = ratio + (top - ratio * bottom) / bottom.mean()
    if missing := missing_for(residuals):
        return Interval.without(ratio, top.size, missing)
    low, high = mean_bounds(residuals, level=level)
    return Interval(ratio, float(low), float(high), top.size, CORRECTED)


def unit_means(
    values: ArrayLike, clusters: Sequence[Hashable] | np.ndarray
) -> tuple[list[Hashable], np.ndarray]:
    """Clusters in order of first appearance, and the mean of the values [n] in each."""
    data = np.asarray(values, dtype=float)
    if len(clusters) != data.size:
        raise ValueError(f"{data.size} values need as many clusters, got {len(clusters)}")
    index: dict[Hashable, int] = {}
    codes = np.array([index.setdefault(name, len(index)) for name in clusters], dtype=int)
    return list(index), np.bincount(codes, weights=data) / np.bincount(codes)


def fewest_needed(units: int) -> str:
    """What an interval of a mean over `units` lacks; empty where it lacks nothing."""
    if units >= FEWEST_UNITS:
        return ""
    return f"{units} {'unit' if units == 1 else 'units'}, an interval needs {FEWEST_UNITS}"


def missing_for(units: np.ndarray) -> str:
    """Why the mean of these units has no interval; empty where it has one."""
    if missing := fewest_needed(units.size):
        return missing
    if units.min() == units.max():
        return f"all {units.size} units have one value, their spread is unknown"
    apart = units.size - int(np.unique(units, return_counts=True)[1].max())
    if apart < min(FEWEST_UNITS, units.size / 2):
        return (
            f"{apart} of {units.size} units differ from the commonest value, "
            f"an interval needs {FEWEST_UNITS}"
        )
    return ""


def _within(
    point: float, units: np.ndarray, sizes: np.ndarray, low: float, high: float, level: float
) -> Interval | None:
    """The exact interval of outcomes in [low, high]; None where that of a mean is narrower."""
    shares = (units - low) / (high - low)
    if not is_share(shares) and not missing_for(units):
        return None
    # Values of one cluster may all agree: as many units as equally large clusters would be.
    effective = sizes.sum() ** 2 / (sizes**2).sum()
    share = (point - low) / (high - low)
    share = min(1.0, max(0.0, share))
    ends = mid_p_bounds(share * effective, effective, level=level)
    found = (low + (high - low) * float(end) for end in ends)
    return Interval(point, *found, units=units.size, method=EXACT)


def _steps(
    data: np.ndarray, units: np.ndarray, low: float, high: float, level: float
) -> Interval | None:
    """Counts that are all equal, or the smallest possible ones and the next."""
    least, most = float(data.min()), float(data.max())
    point = float(units.mean())
    if least == most and least.is_integer():
        step = rare_count(units.size, level=level)
        ends = max(low, point - step), min(high, point + step)
        return Interval(point, *ends, units=units.size, method=ALL_EQUAL)
    if least != low or most - least != 1 or not missing_for(units):
        return None
    return share_interval(float((units - least).sum()), units.size, level=level).scaled(1.0, least)


def _two_values(data: np.ndarray) -> tuple[float, float] | None:
    """The two values that all outcomes have, where each was seen twice; a chance value is not."""
    seen, counts = np.unique(data, return_counts=True)
    return (float(seen[0]), float(seen[1])) if seen.size == 2 and counts.min() > 1 else None


def _units(
    data: np.ndarray, clusters: Sequence[Hashable] | np.ndarray | None, weigh: str
) -> tuple[np.ndarray, np.ndarray]:
    """One value for each independent unit, and its weight in the mean."""
    if clusters is None:
        return data, np.ones(data.size)
    if len(clusters) != data.size:
        raise ValueError(f"{data.size} values need as many clusters, got {len(clusters)}")
    index: dict[Hashable, int] = {}
    codes = np.array([index.setdefault(name, len(index)) for name in clusters], dtype=int)
    sums, sizes = np.bincount(codes, weights=data), np.bincount(codes).astype(float)
    if weigh == "units" or sizes.min() == sizes.max():
        return sums / sizes, np.ones(sizes.size)
    mean = data.mean()
    return mean + (sums - mean * sizes) / sizes.mean(), sizes


def _vector(values: ArrayLike) -> np.ndarray:
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"need a non-empty list of numbers, got shape {data.shape}")
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise ValueError(f"{bad} of {data.size} values are not finite; drop or repair them first")
    return data
