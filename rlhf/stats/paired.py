"""Compute the sign-flip test and the confidence interval of paired differences."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from rlhf.stats.interval import interval, weighted_mean_interval
from rlhf.stats.result import Interval
from rlhf.stats.shares import adjusted_wald_bounds, two_frequent_values
from rlhf.stats.units import (
    effective_number_of_units,
    require_finite_vector,
    rounded_to_13_digits,
    unit_means,
)

PairedKind = Literal["share", "mean", "count"]

MAX_ENUMERATED = 30
"""Maximum number of nonzero differences for which all assignments of signs are enumerated."""

_NUM_ENUMERATED_LARGEST = 14
"""Number of the largest differences whose signs are enumerated for an approximate p value."""

_LARGEST_STEP = 1000
"""The exact distribution is used only if the largest difference is at most this multiple of the
common divisor of the differences."""

_MAX_ADDITIONS = 20_000_000
"""Maximum number of additions for the exact distribution; they take about 20 ms."""


def sign_flip_test(differences: ArrayLike) -> float:
    """Return the two-sided p value of Fisher's sign-flip test of `differences` [n].

    If the two values of every pair are exchangeable, each difference is positive or negative with
    equal probability. The p value is the proportion of all 2^n assignments of signs whose sum is at
    least as far from 0 as the observed sum. It is computed in one of four ways:

    * If all nonzero differences have the same magnitude, the distribution is binomial.
    * For up to 30 nonzero differences, all assignments are enumerated (meet in the middle).
    * If all differences are multiples of one number, and at most 1000 times this number, the exact
      distribution is computed by convolution, unless this needs more than 20 million additions.
      Examples are proportions and counts.
    * Otherwise, the signs of the 14 largest differences are enumerated. The distribution of the sum
      of the other differences is approximated by an Edgeworth expansion with the fourth cumulant. A
      normal approximation of the whole sum would give too small p values if a few differences are
      much larger than the rest.

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
        return _binomial_p_value(round(observed), sizes.size)
    if sizes.size <= MAX_ENUMERATED:
        return _enumerated_p_value(sizes, observed)
    steps = _as_multiples_of_common_divisor(sizes)
    return (
        _approximate_p_value(sizes, observed)
        if steps is None
        else _convolved_p_value(steps, observed)
    )


def difference(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    *,
    kind: PairedKind = "mean",
    level: float = 0.95,
) -> Interval:
    """Return the mean of first[i] - second[i] with a confidence interval over independent units.

    With kind "share", the interval exists for any number of pairs (see `delta_interval`). Values of
    kind "mean" are treated as shares if `first` and `second` together contain only two distinct
    values and both occur often enough (see `two_frequent_values`). Otherwise, the result is that of
    `interval` for the differences, which usually needs at least five independent units.

    Args:
        first: Values, [n].
        second: Values that are subtracted from `first`, in the same order, [n].
        clusters: The independent unit that each pair belongs to, [n]; by default each pair is an
            independent unit.
        kind: "share" for outcomes in [0, 1], "count" for whole numbers, "mean" for other values.
        level: Confidence level.

    Raises:
        ValueError: The lengths differ, there are no values, or some values are not finite.
    """
    deltas = paired_deltas(first, second)
    outcomes = two_frequent_values(np.array([first, second], float)) if kind == "mean" else None
    if clusters is not None:
        deltas = unit_means(deltas, clusters)[1]
    if outcomes is None:
        return delta_interval(deltas, kind=kind, level=level)
    span = outcomes[1] - outcomes[0]
    return delta_interval(rounded_to_13_digits(deltas / span), kind="share", level=level).scaled(
        span
    )


def paired_deltas(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Return first - second [n], with differences in the last digits rounded away.

    Two means of the same samples may differ in the last digits if the samples were added in another
    order. Without rounding, such a pair would count as a nonzero difference.

    Raises:
        ValueError: The lengths differ, there are no values, or some values are not finite.
    """
    left, right = require_finite_vector(first), require_finite_vector(second)
    if left.size != right.size:
        raise ValueError(f"paired values need equal lengths, got {left.size} and {right.size}")
    return rounded_to_13_digits(left - right, float(np.abs([left, right]).max()))


def delta_interval(
    deltas: np.ndarray, weights: np.ndarray | None = None, *, kind: PairedKind, level: float = 0.95
) -> Interval:
    """Return the mean of paired differences [n] of independent units, with its interval.

    With kind "mean" or "count", the result is that of `interval`. With kind "share", the
    differences are in [-1, 1]. Their interval is the adjusted Wald interval if all differences are
    -1, 0 or 1, or if the interval of a mean does not exist. Otherwise, it is the interval of a
    mean, clipped to [-1, 1].

    Args:
        deltas: Difference of each unit, [n].
        weights: Weight of each unit in the mean, [n], for kind "share"; by default all weights are
            equal. The adjusted Wald interval uses the effective number of units.
        kind: See `difference`.
        level: Confidence level.
    """
    if kind != "share":
        return interval(deltas, kind=kind, level=level)
    weights = np.ones(deltas.size) if weights is None else weights
    point, n = float(np.average(deltas, weights=weights)), effective_number_of_units(weights)
    if not np.isin(deltas, (-1.0, 0.0, 1.0)).all():
        estimate = weighted_mean_interval(point, deltas, weights, level)
        if estimate.known:
            return replace(estimate, low=max(-1.0, estimate.low), high=min(1.0, estimate.high))
    parts = deltas * weights * (n / weights.sum())
    low, high = adjusted_wald_bounds(
        parts[parts > 0].sum(), -parts[parts < 0].sum(), n, level=level
    )
    return Interval(point, float(low), float(high), deltas.size, "adjusted Wald")


def _binomial_p_value(observed_abs_sum: int, n: int) -> float:
    """Return P(|heads - tails| >= observed_abs_sum) for n tosses of a fair coin."""
    if observed_abs_sum == 0:
        return 1.0
    heads = (n + observed_abs_sum) // 2
    return min(1.0, 2 * float(special.bdtrc(heads - 1, n, 0.5)))


def _enumerated_p_value(sizes: np.ndarray, observed_abs_sum: float) -> float:
    """Return the two-sided p value from all assignments of signs to `sizes` [n].

    `observed_abs_sum` is the absolute value of the observed sum. The signed sums of each half of
    the sizes are enumerated, and then combined by a binary search.
    """
    half = sizes.size // 2
    left, right = _signed_sums(sizes[:half]), np.sort(_signed_sums(sizes[half:]))
    slack = 1e-9 * float(sizes.sum())
    thresholds: np.ndarray = observed_abs_sum - slack - left
    reached = right.size - np.searchsorted(right, thresholds, side="left")
    share = float(reached.sum()) / (left.size * right.size)
    return min(1.0, 2 * share) if observed_abs_sum > slack else 1.0


def _signed_sums(sizes: np.ndarray) -> np.ndarray:
    """Return the sums of `sizes` [n] for all assignments of signs, [2^n]."""
    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums - size, sums + size])
    return sums


def _as_multiples_of_common_divisor(sizes: np.ndarray) -> np.ndarray | None:
    """Express sizes [n], the largest of which is 1, as multiples of their common divisor.

    Returns:
        Whole numbers [n]; None if there is no common divisor of at least 1/1000, or if the exact
        test would be too slow.
    """
    largest = 1
    for size in np.unique(sizes.round(12)).tolist():
        ratio = Fraction(size).limit_denominator(_LARGEST_STEP)
        largest = math.lcm(largest, ratio.denominator)
        if abs(float(ratio) - size) > 1e-9 or largest > _LARGEST_STEP:
            return None
    steps = np.rint(sizes * largest).astype(int)
    return steps if steps.size * steps.sum() <= _MAX_ADDITIONS else None


def _convolved_p_value(steps: np.ndarray, observed_abs_sum: float) -> float:
    """Return the two-sided p value for whole-number sizes `steps` [n], by convolution.

    `observed_abs_sum` is the absolute value of the sum of the differences, divided by the largest
    size.
    """
    chances = np.ones(1)  # probability of each sum of the sizes that have a positive sign
    for step in np.sort(steps).tolist():
        with_step = np.zeros(chances.size + step)
        with_step[: chances.size] = chances / 2
        with_step[step:] += chances / 2
        chances = with_step
    signed_sum = round(observed_abs_sum * int(steps.max()))
    positive = (int(steps.sum()) + signed_sum) // 2
    return min(1.0, 2 * float(chances[positive:].sum())) if signed_sum else 1.0


def _approximate_p_value(sizes: np.ndarray, observed_abs_sum: float) -> float:
    """Return the two-sided p value for many differences of different `sizes` [n].

    The signs of the largest sizes are enumerated. The distribution of the signed sum of the other
    sizes is approximated by an Edgeworth expansion.
    """
    ordered = np.sort(sizes)[::-1]
    rest = ordered[_NUM_ENUMERATED_LARGEST:]
    variance = float((rest**2).sum())
    excess = -2 * float((rest**4).sum()) / variance**2
    z = (observed_abs_sum - _signed_sums(ordered[:_NUM_ENUMERATED_LARGEST])) / math.sqrt(variance)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    tails = special.ndtr(-z) + density * excess / 24 * (z**3 - 3 * z)
    return min(1.0, max(0.0, 2 * float(tails.mean())))
