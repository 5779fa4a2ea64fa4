"""Calibrate score differences: P(chosen better) = sigmoid(margin / temperature)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit


@dataclass(frozen=True)
class Bin:
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
    bins: list[Bin]


def calibrate(margins: np.ndarray, *, temperature: float = 1.0, num_bins: int = 10) -> Calibration:
    """Return the calibration of ``margins`` = score(chosen) - score(rejected), [N].

    The bins have equal numbers of pairs, up to a difference of 1. Bins of equal width are not used,
    because most of them would be empty.

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
        bins.append(Bin(float(confidence[rows].mean()), float(right[rows].mean()), len(rows)))
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
    if scale == 0 or _slope(margins / scale, 0.0) <= 0:
        return float("inf")
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if _slope(margins / scale, middle) > 0:
            low = middle
        else:
            high = middle
    return scale / high


def _slope(margins: np.ndarray, inverse_temperature: float) -> float:
    """Return the derivative of the mean log-likelihood with respect to 1 / temperature."""
    return float((margins * expit(-margins * inverse_temperature)).mean())
