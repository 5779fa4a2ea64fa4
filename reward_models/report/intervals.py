"""What a reward report needs of `rlhf.stats`: prompts are the independent units of its pairs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats

from rlhf.stats import Interval, adjusted_wald, interval
from rlhf.stats.units import no_interval_reason


def cluster_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable],
    *,
    bounds: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Mean of ``values`` [N] with a 95% interval over ``groups`` [N], such as prompts.

    Pairs of one prompt are not independent: the groups are the units, and each counts as often as
    it has values.

    Args:
        values: one number each.
        groups: the independent unit of each.
        bounds: the smallest and the largest possible value, where they are known.

    Returns:
        ``value``, ``low``, ``high`` (nan without an interval), ``n`` (values) and ``groups``.
    """
    x = np.asarray(values, dtype=float)
    num_groups = len(set(groups))
    if num_groups < 2:
        mean = float(x.mean()) if x.size else float("nan")
        return as_row(Interval.without(mean, num_groups, "one unit"), x.size)
    kind = "auto" if bounds else "mean"
    return as_row(interval(x, list(groups), kind=kind, bounds=bounds, weigh="values"), x.size)


def share_interval(
    values: Sequence[float] | np.ndarray, groups: Sequence[Hashable]
) -> dict[str, float]:
    """Mean of ``values`` [N] in [0, 1] (wins, ties one half) with an interval inside [0, 1]."""
    return cluster_interval(values, groups, bounds=(0.0, 1.0))


def gain_interval(
    gains: Sequence[float] | np.ndarray, groups: Sequence[Hashable]
) -> dict[str, float]:
    """Mean of paired differences ``gains`` [N] of outcomes in [0, 1]; keys as `cluster_interval`.

    Differences of which few are not 0 have the adjusted Wald interval of paired shares.
    """
    x, index = np.asarray(gains, dtype=float), group_index(groups)
    sizes = np.bincount(index).astype(float) if index.size else np.zeros(0)
    if sizes.size < 2 or not no_interval_reason(np.bincount(index, weights=x) / sizes):
        return cluster_interval(x, groups)
    weight = sizes.mean()
    won, lost = x[x > 0].sum() / weight, -x[x < 0].sum() / weight
    low, high = adjusted_wald(won, lost, sizes.size)
    found = Interval(float(x.mean()), float(low), float(high), sizes.size)
    return as_row(found, x.size)


def as_row(found: Interval, n: int) -> dict[str, float]:
    """An interval as reports keep it, with the number of values beside that of the units."""
    ends = {"low": found.low, "high": found.high}
    return {"value": found.value, "n": n, **ends, "groups": found.units}


def group_index(groups: Sequence[Hashable]) -> np.ndarray:
    """Group of each row as a number from 0, in order of first appearance. [N]"""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(group, len(seen)) for group in groups], dtype=int)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean rank. [N]"""
    return stats.rankdata(values) - 1


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation; nan if one side is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; nan if one side is constant."""
    return pearson(ranks(np.asarray(a)), ranks(np.asarray(b)))
