"""Validate the inputs of the interval functions, and compute their independent units."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

FEWEST_UNITS = 5
"""Smallest number of units, and of units unlike the most common value, for an interval."""

EQUAL_UNITS_REASON = "have one value, their spread is unknown"
"""End of the reason why equal units have no interval."""

FEWEST_EFFECTIVE = 2
"""Smallest effective number of units of different sizes for the interval of a mean."""


def finite_vector(values: ArrayLike) -> np.ndarray:
    """Return `values` as a float array [n].

    Raises:
        ValueError: there are no values, they are not one-dimensional, or some are not finite.
    """
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"need a non-empty list of numbers, got shape {data.shape}")
    return require_finite(data)


def require_finite(data: np.ndarray) -> np.ndarray:
    """Return `data` unchanged; raise ValueError if a value is not finite."""
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise ValueError(f"{bad} of {data.size} values are not finite; drop or repair them first")
    return data


def cluster_index(
    clusters: Sequence[Hashable] | np.ndarray,
) -> tuple[list[Hashable], np.ndarray]:
    """Return the distinct clusters in order, and the index [n] of each row's cluster."""
    positions: dict[Hashable, int] = {}
    codes = np.array([positions.setdefault(name, len(positions)) for name in clusters], dtype=int)
    return list(positions), codes


def unit_means(
    values: ArrayLike, clusters: Sequence[Hashable] | np.ndarray
) -> tuple[list[Hashable], np.ndarray]:
    """Return the distinct clusters in order of first appearance, and the mean of their values [n].

    Raises:
        ValueError: the numbers of values and clusters differ.
    """
    data = np.asarray(values, dtype=float)
    require_equal_length(data, clusters)
    names, codes = cluster_index(clusters)
    return names, np.bincount(codes, weights=data) / np.bincount(codes)


def require_equal_length(data: np.ndarray, clusters: Sequence[Hashable] | np.ndarray) -> None:
    """Raise ValueError if the numbers of values and clusters differ."""
    if len(clusters) != data.size:
        raise ValueError(f"{data.size} values need as many clusters, got {len(clusters)}")


def rounded(values: np.ndarray, largest: float | None = None) -> np.ndarray:
    """Return values [n] rounded to 2^-44 of the largest magnitude (13 digits).

    Values that differ only by rounding errors become equal, so that they are not counted as spread
    or as differences. `largest` is the largest magnitude that the values were computed from.
    """
    if largest is None:
        largest = float(np.abs(values).max())
    if largest == 0:
        return values
    step = math.ldexp(1.0, max(math.frexp(largest)[1] - 44, -1000))
    return np.rint(values / step) * step


def effective_units(sizes: np.ndarray) -> float:
    """Return the number of equal units with the variance of units of `sizes` [n] (Kish 1965)."""
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def too_few_units(units: int) -> str:
    """Return the reason "too few units" for the interval of a mean; empty if there are enough."""
    if units >= FEWEST_UNITS:
        return ""
    return f"{units} {'unit' if units == 1 else 'units'}, an interval needs {FEWEST_UNITS}"


def no_interval_reason(units: np.ndarray) -> str:
    """Return the reason why the mean of `units` [n] has no interval; empty if it has one."""
    if missing := too_few_units(units.size):
        return missing
    units = rounded(units)
    if units.min() == units.max():
        return f"all {units.size} units {EQUAL_UNITS_REASON}"
    differing = units.size - int(np.unique(units, return_counts=True)[1].max())
    if differing < min(FEWEST_UNITS, units.size / 2):
        return (
            f"{differing} of {units.size} units differ from the commonest value, "
            f"an interval needs {FEWEST_UNITS}"
        )
    return ""
