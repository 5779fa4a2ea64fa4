"""Compute intervals of shares and of differences of paired shares."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from rlhf.stats.result import Interval

EXACT_LABEL = "exact (mid-p)"


def mid_p_bounds(
    successes: ArrayLike, units: ArrayLike, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return bounds of a binomial share by the exact distribution with the mid-p correction.

    The bounds solve P(X > x) + P(X = x) / 2 = (1 - level) / 2 and the mirrored equation (Lancaster
    1961; Agresti & Gottard 2007). The tails are incomplete beta functions, so that neither argument
    has to be an integer. With few units, the coverage of Wilson's interval is as low as 83% near 0
    and 1; the coverage of this interval is at least 92%.

    Args:
        successes: [...] sum of the outcomes, each in [0, 1].
        units: [...] number of independent outcomes.
        level: confidence level.

    Returns:
        Lower and upper bounds [...].
    """
    x, n = np.broadcast_arrays(np.asarray(successes, float), np.asarray(units, float))
    if x.ndim == 0:
        low, high = _scalar_bounds(float(x), float(n), level)
        return np.asarray(low), np.asarray(high)
    return _bounds(x, n, level)


def share_interval(successes: float, units: int, *, level: float = 0.95) -> Interval:
    """Return the share `successes / units` of outcomes in [0, 1] with its exact interval.

    `successes` need not be an integer: a unit may be the mean of several samples. Among all
    distributions on [0, 1] with a given mean, the Bernoulli distribution has the largest variance,
    so the interval is valid for all of them.

    Raises:
        ValueError: `successes` is outside [0, `units`], or `units` is less than 1.
    """
    if not 0 <= successes <= units or units < 1:
        raise ValueError(f"need 0 <= successes <= units and units > 0, got {successes} of {units}")
    low, high = mid_p_bounds(successes, units, level=level)
    return Interval(successes / units, float(low), float(high), int(units), EXACT_LABEL)


def adjusted_wald(
    gains: ArrayLike, losses: ArrayLike, units: ArrayLike, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of a difference of paired shares, (gains - losses) / units.

    In the adjusted Wald interval of Bonett & Price (2012), one gain and one loss are added, so that
    the interval of equal differences has a positive width. It uses Student's t with n + 1 degrees
    of freedom, because the coverage of the normal quantile is too low for 2 to 10 pairs.

    Args:
        gains: [...] sum of the positive differences, each in [0, 1].
        losses: [...] absolute sum of the negative differences.
        units: [...] number of pairs.
        level: confidence level.

    Returns:
        Lower and upper bounds [...] inside [-1, 1].
    """
    plus, minus = np.asarray(gains, float), np.asarray(losses, float)
    n = np.asarray(units, float)
    center = (plus - minus) / (n + 2)
    square = (plus + minus + 2) / (n + 2)
    quantile = special.stdtrit(n + 1, (1 + level) / 2)
    half = quantile * np.sqrt(np.maximum(square - center**2, 0) / (n + 2))
    return np.maximum(center - half, -1.0), np.minimum(center + half, 1.0)


@lru_cache(maxsize=4096)
def _scalar_bounds(x: float, n: float, level: float) -> tuple[float, float]:
    """Return the bounds of one share; cached, because tables repeat the same few shares."""
    low, high = _bounds(np.array([x]), np.array([n]), level)
    return float(low[0]), float(high[0])


def _bounds(x: np.ndarray, n: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    tail = (1 - level) / 2
    low = np.where(x <= 0, 0.0, _solve(x, n, tail))
    high = np.where(x >= n, 1.0, 1.0 - _solve(n - x, n, tail))
    return low, high


def _solve(x: np.ndarray, n: np.ndarray, tail: float) -> np.ndarray:
    """Solve P(X > x) + P(X = x) / 2 = `tail` for p, with X ~ Binomial(n, p), by bisection."""
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


def is_share(values: np.ndarray) -> bool:
    """Return whether every value is 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())
