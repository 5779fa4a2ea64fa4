"""Validate the inputs of the interval functions, and average values in each independent unit."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

FEWEST_UNITS = 5
"""An interval of a mean needs at least this number of units. It also needs this number of units
that differ from the most common value; with fewer than ten units, half of them must differ."""

EQUAL_UNITS_REASON = "have the same value, so the variance cannot be estimated"
"""End of the message that says why units with equal values have no interval."""

FEWEST_EFFECTIVE = 2
"""Minimum effective number of units for the interval of a mean over units of different sizes."""


def require_finite_vector(values: ArrayLike) -> np.ndarray:
    """Return `values` as a float array [n].

    Raises:
        ValueError: `values` is empty or not one-dimensional, or some values are not finite.
    """
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"expected a non-empty list of numbers, got shape {data.shape}")
    return require_finite(data)


def require_finite(data: np.ndarray) -> np.ndarray:
    """Return `data` unchanged; raise ValueError if a value is not finite."""
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise ValueError(f"{bad} of {data.size} values are not finite; remove or replace them")
    return data


def distinct_clusters_and_index(
    clusters: Sequence[Hashable] | np.ndarray,
) -> tuple[list[Hashable], np.ndarray]:
    """Return the distinct clusters in order of first appearance, and each row's cluster index [n].

    The index of a cluster is its position in the list of distinct clusters.
    """
    positions: dict[Hashable, int] = {}
    codes = np.array([positions.setdefault(name, len(positions)) for name in clusters], dtype=int)
    return list(positions), codes


def unit_means(
    values: ArrayLike, clusters: Sequence[Hashable] | np.ndarray
) -> tuple[list[Hashable], np.ndarray]:
    """Return the C distinct clusters in order of first appearance, and each cluster's mean [C].

    `values` and `clusters` have one element for each row.

    Raises:
        ValueError: The numbers of values and clusters differ.
    """
    data = np.asarray(values, dtype=float)
    require_equal_length(data, clusters)
    names, codes = distinct_clusters_and_index(clusters)
    return names, np.bincount(codes, weights=data) / np.bincount(codes)


def require_equal_length(data: np.ndarray, clusters: Sequence[Hashable] | np.ndarray) -> None:
    """Raise ValueError if the numbers of values and clusters differ."""
    if len(clusters) != data.size:
        raise ValueError(
            f"expected one cluster per value, got {data.size} values and {len(clusters)} clusters"
        )


def rounded_to_13_digits(values: np.ndarray, largest: float | None = None) -> np.ndarray:
    """Return values [n] rounded to multiples of about 2^-44 of the largest magnitude (13 digits).

    Values that differ only by rounding errors become equal, so that rounding errors do not count as
    variance or as differences. `largest` is the largest magnitude of the numbers from which the
    values were computed. By default, it is the largest magnitude of `values`.
    """
    if largest is None:
        largest = float(np.abs(values).max())
    if largest == 0:
        return values
    step = math.ldexp(1.0, max(math.frexp(largest)[1] - 44, -1000))
    return np.rint(values / step) * step


def effective_number_of_units(weights: np.ndarray) -> float:
    """Return the effective number of units with `weights` [n] (Kish 1965).

    A mean of this number of units with equal weights has the same variance.
    """
    return float(weights.sum() ** 2 / (weights**2).sum())


def too_few_units_reason(units: int) -> str:
    """Return why this number of units is too small for an interval of a mean.

    The result is an empty string if there are enough units.
    """
    if units >= FEWEST_UNITS:
        return ""
    return f"{units} {'unit' if units == 1 else 'units'}, an interval needs {FEWEST_UNITS}"


def no_interval_reason(unit_values: np.ndarray, weights: np.ndarray | None = None) -> str:
    """Return why the mean of `unit_values` [n] has no interval.

    The result is an empty string if the mean has an interval. With `weights` [n], the units that
    differ from the most common value are counted by their effective number.
    """
    if missing := too_few_units_reason(unit_values.size):
        return missing
    unit_values = rounded_to_13_digits(unit_values)
    if unit_values.min() == unit_values.max():
        return f"all {unit_values.size} units {EQUAL_UNITS_REASON}"
    values, counts = np.unique(unit_values, return_counts=True)
    is_different = unit_values != values[counts.argmax()]
    weights = np.ones(unit_values.size) if weights is None else weights
    differing = effective_number_of_units(weights[is_different])
    needed = min(FEWEST_UNITS, effective_number_of_units(weights) / 2)
    if differing >= needed:
        return ""
    count = int(is_different.sum())
    equivalent = "" if differing == count else f", with the weight of {differing:.1f} equal units"
    return (
        f"only {count} of {unit_values.size} units differ from the most common value{equivalent}, "
        f"an interval needs {math.ceil(needed)} such units"
    )
