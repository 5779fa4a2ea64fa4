"""Compute intervals of proportions ("shares") and of differences of paired proportions."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from rlhf.stats.means import EstimateMoments
from rlhf.stats.result import Interval

EXACT_LABEL = "exact (mid-p)"

_FEWEST_OUTCOMES = 10
"""Minimum number of outcomes for treating two observed values as the only possible values."""


def mid_p_bounds(
    successes: ArrayLike, units: ArrayLike, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of a binomial proportion, from the exact mid-p test.

    The lower bound solves P(X > x) + P(X = x) / 2 = (1 - level) / 2 for the proportion, and the
    upper bound solves P(X < x) + P(X = x) / 2 = (1 - level) / 2 (Lancaster 1961; Agresti & Gottard
    2007). The probabilities are incomplete beta functions, so `successes` and `units` need not be
    integers. With few units, the coverage of Wilson's interval is as low as 83% for proportions
    near 0 and 1; the coverage of this interval is at least 92%.

    Args:
        successes: Sum of the outcomes, each in [0, 1]; [...].
        units: Number of independent units, [...].
        level: Confidence level.

    Returns:
        Lower and upper bounds [...].
    """
    x, n = np.broadcast_arrays(np.asarray(successes, float), np.asarray(units, float))
    if x.ndim == 0:
        low, high = _scalar_mid_p_bounds(float(x), float(n), level)
        return np.asarray(low), np.asarray(high)
    return _array_mid_p_bounds(x, n, level)


def share_interval(successes: float, units: int, *, level: float = 0.95) -> Interval:
    """Return the proportion `successes / units` with its exact interval.

    `successes` is the sum of outcomes in [0, 1]. It need not be an integer, because a unit may be
    the mean of several samples. The interval is also valid in this case, because the Bernoulli
    distribution has the largest variance of all distributions on [0, 1] with the same mean.

    Raises:
        ValueError: `successes` is outside [0, `units`], or `units` is less than 1.
    """
    if not 0 <= successes <= units or units < 1:
        raise ValueError(f"need 0 <= successes <= units and units > 0, got {successes} of {units}")
    low, high = mid_p_bounds(successes, units, level=level)
    return Interval(successes / units, float(low), float(high), int(units), EXACT_LABEL)


def clopper_pearson_bounds(successes: int, units: int) -> tuple[float, float]:
    """Return the exact 95% bounds of a binomial proportion (Clopper & Pearson 1934).

    The coverage is at least 95%. The coverage of `mid_p_bounds`, which are narrower, may be lower.
    """
    failures = units - successes
    low = special.betaincinv(successes, failures + 1, 0.025) if successes else 0.0
    high = special.betaincinv(successes + 1, failures, 0.975) if failures else 1.0
    return float(low), float(high)


def adjusted_wald_bounds(
    gains: ArrayLike, losses: ArrayLike, units: ArrayLike, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of the difference of paired proportions, (gains - losses) / units.

    The moments are those of `adjusted_wald_moments`. This function uses the quantile of Student's t
    distribution, because the coverage with the normal quantile is too low for 2 to 10 pairs.

    Args:
        gains: Sum of the positive differences, each in [0, 1]; [...].
        losses: Absolute value of the sum of the negative differences, [...].
        units: Number of pairs, [...].
        level: Confidence level.

    Returns:
        Lower and upper bounds [...] inside [-1, 1].
    """
    center, error, _, freedom = adjusted_wald_moments(gains, losses, units)
    half = special.stdtrit(freedom, (1 + level) / 2) * error
    return np.maximum(center - half, -1.0), np.minimum(center + half, 1.0)


def adjusted_wald_moments(gains: ArrayLike, losses: ArrayLike, units: ArrayLike) -> EstimateMoments:
    """Return the moments [...] of the difference of paired proportions, (gains - losses) / units.

    The adjusted Wald interval of Bonett & Price (2012) adds one gain and one loss to the data, so
    that the error is positive even if all differences are equal. There are n + 1 degrees of
    freedom, where n is `units`. The arguments are those of `adjusted_wald_bounds`.
    """
    plus, minus = np.asarray(gains, float), np.asarray(losses, float)
    n = np.asarray(units, float)
    center = (plus - minus) / (n + 2)
    square = (plus + minus + 2) / (n + 2)
    error = np.sqrt(np.maximum(square - center**2, 0) / (n + 2))
    return EstimateMoments(center, error, np.zeros_like(error), n + 1)


@lru_cache(maxsize=4096)
def _scalar_mid_p_bounds(x: float, n: float, level: float) -> tuple[float, float]:
    """Return the mid-p bounds of one proportion.

    The results are cached, because the same proportions occur often in a table.
    """
    low, high = _array_mid_p_bounds(np.array([x]), np.array([n]), level)
    return float(low[0]), float(high[0])


def _array_mid_p_bounds(
    x: np.ndarray, n: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return lower and upper mid-p bounds [...] for x [...] successes in n [...] units."""
    tail = (1 - level) / 2
    low = np.where(x <= 0, 0.0, _lower_mid_p_bound(x, n, tail))
    high = np.where(x >= n, 1.0, 1.0 - _lower_mid_p_bound(n - x, n, tail))
    return low, high


def _lower_mid_p_bound(x: np.ndarray, n: np.ndarray, tail: float) -> np.ndarray:
    """Solve P(X > x) + P(X = x) / 2 = `tail` for p by bisection, where X ~ Binomial(n, p)."""
    low, high = np.zeros_like(x), np.ones_like(x)
    inside = np.clip(x, 1e-12, None)
    rest = np.clip(n - x, 1e-12, None)
    for _ in range(50):
        middle = (low + high) / 2
        above = np.where(x < n, special.betainc(inside + 1, rest, middle), 0.0)
        reached = np.where(x > 0, special.betainc(inside, rest + 1, middle), 1.0)
        too_high = (above + reached) / 2 > tail
        high = np.where(too_high, middle, high)
        low = np.where(too_high, low, middle)
    return (low + high) / 2


def is_binary(values: ArrayLike) -> bool:
    """Return whether every value is 0 or 1."""
    return bool(np.isin(values, (0, 1)).all())


def two_frequent_values(values: ArrayLike) -> tuple[float, float] | None:
    """Return the two distinct values, smallest first, if each occurs at least twice.

    The result is None if there are not exactly two distinct values. It is also None for fewer than
    ten outcomes, because these may have only two values by chance.
    """
    distinct, counts = np.unique(np.asarray(values, float), return_counts=True)
    if counts.sum() < _FEWEST_OUTCOMES or distinct.size != 2 or counts.min() < 2:
        return None
    return float(distinct[0]), float(distinct[1])
