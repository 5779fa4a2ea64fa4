"""Analyze paired differences: sign-flip test and confidence interval."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from rlhf.stats.interval import interval
from rlhf.stats.means import SKEW_CORRECTED_T, mean_bounds
from rlhf.stats.result import Interval
from rlhf.stats.shares import adjusted_wald, is_share
from rlhf.stats.units import no_interval_reason, rounded, unit_means

MAX_ENUMERATED = 30
"""Largest number of nonzero differences for which all assignments of signs are enumerated."""

_LARGEST = 14
"""Number of the largest differences whose signs are enumerated if there are more than that."""

_LARGEST_STEP = 1000
"""Largest difference in units of their common divisor for which the exact distribution is used."""

_MOST_ADDITIONS = 20_000_000
"""Largest number of additions to compute the exact distribution, about 20 ms."""


def sign_flip_test(differences: ArrayLike) -> float:
    """Return the two-sided p value of Fisher's sign-flip test of `differences` [n].

    If the two values of every pair are exchangeable, each difference has either sign with equal
    probability. The p value is the share of all 2^n assignments of signs whose sum is at least as
    far from 0 as the observed sum. It is exact for up to 30 nonzero differences (all assignments
    are enumerated, meet in the middle), for equal magnitudes (binomial distribution), and for
    multiples of one number, such as shares and counts, up to the 1000-fold (convolution). Otherwise
    the signs of the 14 largest differences are enumerated, and the sum of the others has an
    Edgeworth expansion with the fourth cumulant, so that a few large differences cannot make a
    winner.

    Returns:
        The p value; 1.0 if all differences are 0.
    """
    data = np.asarray(differences, dtype=float)
    sizes = np.abs(data[data != 0])
    if sizes.size == 0:
        return 1.0
    observed = abs(float(data.sum()))
    unit = float(sizes.max())
    sizes, observed = sizes / unit, observed / unit
    if sizes.min() > 1 - 1e-9:
        return _binomial(round(observed), sizes.size)
    if sizes.size <= MAX_ENUMERATED:
        return _enumerated(sizes, observed)
    steps = _common_steps(sizes)
    return _approximated(sizes, observed) if steps is None else _convolved(steps, observed)


def difference(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    *,
    kind: Literal["auto", "share", "mean"] = "auto",
    level: float = 0.95,
) -> Interval:
    """Return the mean of first[i] - second[i] with a confidence interval over independent units.

    Differences of shares have the adjusted Wald interval for any number of pairs; others have the
    interval of `interval`, which needs five pairs.

    Args:
        first: [n] values.
        second: [n] values to subtract, in the same order.
        clusters: [n] independent unit of each pair; by default every pair is a unit.
        kind: "share" if the values are outcomes in [0, 1]; "auto" treats values that are all 0 or 1
        as shares.
        level: confidence level.

    Raises:
        ValueError: the lengths differ, there are no values, or some are not finite.
    """
    left, right = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if left.shape != right.shape:
        raise ValueError(f"paired values need equal lengths, got {left.size} and {right.size}")
    if kind == "auto":
        kind = "share" if left.size and is_share(left) and is_share(right) else "mean"
    deltas = paired_deltas(left, right)
    if clusters is not None:
        deltas = unit_means(deltas, clusters)[1]
    return delta_interval(deltas, kind=kind, level=level)


def paired_deltas(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return left - right [n], without rounding errors.

    The means of the same samples in two orders may differ in the last digit.
    """
    return rounded(left - right, float(np.abs([left, right]).max(initial=0.0)))


def delta_interval(
    deltas: np.ndarray, *, kind: Literal["share", "mean"], level: float = 0.95
) -> Interval:
    """Return the interval of the mean of paired differences [n], one for each independent unit."""
    if kind == "mean":
        return interval(deltas, kind="mean", level=level)
    point, n = float(deltas.mean()), deltas.size
    if not np.isin(deltas, (-1.0, 0.0, 1.0)).all() and not no_interval_reason(deltas):
        low, high = mean_bounds(deltas, level=level)
        return Interval(point, max(-1.0, float(low)), min(1.0, float(high)), n, SKEW_CORRECTED_T)
    gains, losses = deltas[deltas > 0].sum(), -deltas[deltas < 0].sum()
    low, high = adjusted_wald(gains, losses, n, level=level)
    return Interval(point, float(low), float(high), n, "adjusted Wald")


def _binomial(observed: int, n: int) -> float:
    """Return P(|heads - tails| >= observed) of n fair coins."""
    if observed == 0:
        return 1.0
    heads = (n + observed) // 2
    return min(1.0, 2 * float(special.bdtrc(heads - 1, n, 0.5)))


def _enumerated(sizes: np.ndarray, observed: float) -> float:
    """Return the two-sided p value, by enumerating the sign assignments of two halves."""
    half = sizes.size // 2
    left, right = _signed_sums(sizes[:half]), np.sort(_signed_sums(sizes[half:]))
    slack = 1e-9 * float(sizes.sum())
    thresholds: np.ndarray = observed - slack - left
    reached = right.size - np.searchsorted(right, thresholds, side="left")
    share = float(reached.sum()) / (left.size * right.size)
    return min(1.0, 2 * share) if observed > slack else 1.0


def _signed_sums(sizes: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums - size, sums + size])
    return sums


def _common_steps(sizes: np.ndarray) -> np.ndarray | None:
    """Return sizes [n], of which the largest is 1, as multiples of their largest common divisor.

    Returns:
        Whole numbers [n]; None if there is no such divisor, or the exact test would be too slow.
    """
    largest = 1
    for size in np.unique(sizes.round(12)).tolist():
        ratio = Fraction(size).limit_denominator(_LARGEST_STEP)
        largest = math.lcm(largest, ratio.denominator)
        if abs(float(ratio) - size) > 1e-9 or largest > _LARGEST_STEP:
            return None
    steps = np.rint(sizes * largest).astype(int)
    return steps if steps.size * steps.sum() <= _MOST_ADDITIONS else None


def _convolved(steps: np.ndarray, observed: float) -> float:
    """Return the two-sided p value of whole-number sizes, by convolution of their distributions.

    `observed` is the absolute sum in units of the largest size.
    """
    chances = np.ones(1)  # probability of each sum of the sizes that have a positive sign
    for step in np.sort(steps).tolist():
        with_step = np.zeros(chances.size + step)
        with_step[: chances.size] = chances / 2
        with_step[step:] += chances / 2
        chances = with_step
    signed_sum = round(observed * int(steps.max()))
    positive = (int(steps.sum()) + signed_sum) // 2
    return min(1.0, 2 * float(chances[positive:].sum())) if signed_sum else 1.0


def _approximated(sizes: np.ndarray, observed: float) -> float:
    """Return the p value by enumeration of the largest sizes and expansion of the others' sum."""
    ordered = np.sort(sizes)[::-1]
    rest = ordered[_LARGEST:]
    variance = float((rest**2).sum())
    excess = -2 * float((rest**4).sum()) / variance**2
    z = (observed - _signed_sums(ordered[:_LARGEST])) / math.sqrt(variance)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    tails = special.ndtr(-z) + density * excess / 24 * (z**3 - 3 * z)
    return min(1.0, max(0.0, 2 * float(tails.mean())))
