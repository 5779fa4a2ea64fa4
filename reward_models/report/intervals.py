"""Compute the intervals of a report on rewards; the independent units are prompts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats

from rlhf.stats import Interval, interval
from rlhf.stats.paired import delta_interval
from rlhf.stats.units import distinct_clusters_and_index


def clustered_mean_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable],
    *,
    bounds: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Return the mean of values with a 95% interval that is clustered by group.

    Args:
        values: Values of equal weight, [N]. Values of the same group may be dependent.
        groups: Group of each value, such as its prompt, [N].
        bounds: Smallest and largest possible value; None if they are unknown.

    Returns:
        A dictionary with ``value``, ``low`` and ``high`` (nan if there is no interval), ``n``
        (number of values) and ``groups`` (number of groups).
    """
    x = np.asarray(values, dtype=float)
    num_groups = len(set(groups))
    if num_groups < 2:
        mean = float(x.mean()) if x.size else float("nan")
        return interval_as_dict(Interval.without_bounds(mean, num_groups, "one unit"), x.size)
    result = interval(x, list(groups), kind="mean", bounds=bounds, weigh="values")
    return interval_as_dict(result, x.size)


def proportion_interval(
    values: Sequence[float] | np.ndarray, groups: Sequence[Hashable]
) -> dict[str, float]:
    """Return `clustered_mean_interval` of ``values`` in [0, 1], [N], with the bounds 0 and 1."""
    return clustered_mean_interval(values, groups, bounds=(0.0, 1.0))


def paired_difference_interval(
    gains: Sequence[float] | np.ndarray, groups: Sequence[Hashable]
) -> dict[str, float]:
    """Return the mean of paired differences with a 95% interval that is clustered by group.

    The interval is that of `delta_interval` for the mean differences of the groups, weighted by
    the sizes of the groups.

    Args:
        gains: Differences in [-1, 1] between two outcomes that are each in [0, 1], [N].
        groups: Group of each difference, such as its prompt, [N].

    Returns:
        A dictionary with the keys of `clustered_mean_interval`.
    """
    x = np.asarray(gains, dtype=float)
    names, index = distinct_clusters_and_index(groups)
    if len(names) < 2:
        return clustered_mean_interval(x, groups)
    sizes = np.bincount(index).astype(float)
    means = np.bincount(index, weights=x) / sizes
    return interval_as_dict(delta_interval(means, sizes, kind="share"), x.size)


def interval_as_dict(result: Interval, n: int) -> dict[str, float]:
    """Convert an interval of ``n`` values to a dictionary, as `clustered_mean_interval` returns."""
    ends = {"low": result.low, "high": result.high}
    return {"value": result.value, "n": n, **ends, "groups": result.units}


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Pearson correlation; nan if a vector is constant or has fewer than two values."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Spearman correlation; nan in the same cases as `pearson`."""
    return pearson(stats.rankdata(a), stats.rankdata(b))
