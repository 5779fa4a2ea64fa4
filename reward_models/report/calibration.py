"""Calibrate score differences: P(chosen better) = sigmoid(margin / temperature)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy.special import expit, stdtrit

from rlhf.common.text import count_text
from rlhf.stats import Interval
from rlhf.stats.units import distinct_clusters_and_index

_MIN_PROMPTS = 20
"""Minimum number of prompts for the interval of the temperature."""


@dataclass(frozen=True)
class CalibrationBin:
    """One bar of a reliability diagram."""

    confidence: float
    """Mean predicted probability of the reply with the higher score, in [0.5, 1]."""
    accuracy: float
    """Fraction of pairs in which the reply with the higher score is chosen; a tie counts 1/2."""
    count: int
    """Number of pairs in the bin."""


@dataclass(frozen=True)
class Calibration:
    """Quality of the probabilities sigmoid(margin / temperature) on labeled pairs."""

    temperature: float
    nll: float
    """Mean of -log P(chosen is better), in nats; log 2 = 0.693 if every probability is 1/2."""
    brier: float
    """Mean of (1 - P(chosen is better))^2; 0.25 if every probability is 1/2."""
    ece: float
    """Expected calibration error: mean of |accuracy - confidence| over the bins, weighted by
    ``count``."""
    bins: list[CalibrationBin]


def calibration_metrics(
    margins: np.ndarray, *, temperature: float = 1.0, num_bins: int = 10
) -> Calibration:
    """Return the calibration of ``margins`` = score(chosen) - score(rejected), [N].

    The pairs are sorted by confidence into bins with equal numbers of pairs, up to a difference of
    1. Bins of equal width are not used, because most of them would be empty.

    Raises:
        ValueError: There are no margins.
    """
    margins = np.asarray(margins, dtype=float)
    if len(margins) == 0:
        raise ValueError("calibration needs at least one pair")
    scaled = margins / temperature
    p = expit(scaled)
    confidence = expit(np.abs(scaled))
    right = np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))
    bins = []
    for rows in np.array_split(np.argsort(confidence, kind="stable"), min(num_bins, len(margins))):
        bins.append(
            CalibrationBin(float(confidence[rows].mean()), float(right[rows].mean()), len(rows))
        )
    gaps = sum(b.count * abs(b.accuracy - b.confidence) for b in bins)
    return Calibration(
        temperature=temperature,
        nll=float(np.logaddexp(0.0, -scaled).mean()),
        brier=float(((1 - p) ** 2).mean()),
        ece=gaps / len(margins),
        bins=bins,
    )


def fit_temperature(margins: np.ndarray) -> float:
    """Return the temperature with the lowest NLL (Guo et al. 2017, applied to pairs).

    The NLL is convex in 1 / temperature and is minimized by bisection. If the mean margin is not
    positive, the result is inf. If every margin is positive, the NLL has no minimum, and the result
    is far below the mean margin.
    """
    margins = np.asarray(margins, dtype=float)
    scale = float(np.abs(margins).mean()) if len(margins) else 0.0
    if scale == 0 or _log_likelihood_derivative(margins / scale, 0.0) <= 0:
        return float("inf")
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if _log_likelihood_derivative(margins / scale, middle) > 0:
            low = middle
        else:
            high = middle
    return scale / high


def temperature_interval(margins: np.ndarray, groups: Sequence[Hashable]) -> Interval:
    """Return the fitted temperature with its interval from the profile likelihood.

    The interval contains the temperatures whose log-likelihood is at most t^2 / 2 times the design
    effect below its maximum, where t is the quantile of Student's t for the groups. The design
    effect is the variance of the derivative with clusters, divided by the variance without
    clusters, and at least 1. The upper end can be inf. There is no interval with fewer than 20
    groups, or if all margins that are not 0 have the same sign, because the likelihood then has no
    maximum.

    Args:
        margins: Differences score(chosen) - score(rejected), [N].
        groups: Group of each margin, such as its prompt, [N].
    """
    fitted, (names, index) = fit_temperature(margins), distinct_clusters_and_index(groups)
    if len(names) < _MIN_PROMPTS:
        needs = f"{count_text(len(names), 'prompt')}, an interval needs {_MIN_PROMPTS}"
        return Interval.without_bounds(fitted, len(names), needs)
    if (margins >= 0).all() or (margins <= 0).all():
        return Interval.without_bounds(fitted, len(names), "the scores separate all pairs")
    inverse = 1 / fitted
    derivatives = margins * expit(-margins * inverse)
    clustered = np.bincount(index, weights=derivatives)
    effect = max(1.0, float((clustered**2).sum() / (derivatives**2).sum()))
    limit = effect * float(stdtrit(len(names) - 1, 0.975)) ** 2
    lowest = np.logaddexp(0.0, -margins * inverse).sum()

    def deviance_excess(inverse_temperature: float) -> float:
        return 2 * float(np.logaddexp(0.0, -margins * inverse_temperature).sum() - lowest) - limit

    above = 2 * inverse + 1 / float(np.abs(margins).mean())
    while deviance_excess(above) < 0:
        above *= 2
    low = 1 / optimize.root_scalar(deviance_excess, bracket=(inverse, above)).root
    high = float("inf")
    if deviance_excess(0.0) > 0:
        high = 1 / optimize.root_scalar(deviance_excess, bracket=(0.0, inverse)).root
    return Interval(fitted, low, high, len(names), "profile likelihood")


def _log_likelihood_derivative(margins: np.ndarray, inverse_temperature: float) -> float:
    """Return the derivative of the mean log-likelihood with respect to 1 / temperature."""
    return float((margins * expit(-margins * inverse_temperature)).mean())
