"""Compute the interval of a mean of arbitrary values: Student's t, corrected for skewness."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

SKEW_CORRECTED_T = "t, corrected for skewness"


class EstimateMoments(NamedTuple):
    """Moments of an estimated mean, which determine its interval; all arrays have equal shapes."""

    mean: np.ndarray
    """Estimate of the mean."""
    error: np.ndarray
    """Standard error of the mean."""
    skewness: np.ndarray
    """Skewness of the mean; for n independent values, that of one value divided by sqrt(n)."""
    freedom: np.ndarray
    """Degrees of freedom of the standard error."""


def mean_moments(values: np.ndarray) -> EstimateMoments:
    """Return the moments, each [...], of the mean of n >= 2 independent values [..., n]."""
    n = values.shape[-1]
    mean = values.mean(axis=-1)
    centered = values - mean[..., None]
    squares = centered * centered
    variance = squares.sum(axis=-1) / (n - 1)
    third = (squares * centered).mean(axis=-1)
    error = np.sqrt(variance / n)
    return EstimateMoments(
        mean, error, _ratio_or_zero(third, variance**1.5 * np.sqrt(n)), np.full_like(mean, n - 1)
    )


def run_and_task_mean_moments(scores: np.ndarray) -> EstimateMoments:
    """Return the moments, each [...], of the mean over runs and tasks of [..., runs, tasks] scores.

    The runs are independent samples, and the tasks are fixed strata. The degrees of freedom are
    Satterthwaite's, because the variances of the tasks differ.
    """
    runs, tasks = scores.shape[-2:]
    centered = scores - scores.mean(axis=-2, keepdims=True)
    variances = (centered**2).sum(axis=-2) / (runs - 1)
    third = (centered**3).mean(axis=-2).sum(axis=-1) / (runs**2 * tasks**3)
    total = variances.sum(axis=-1)
    variance = total / (runs * tasks**2)
    squares: np.ndarray = (variances**2).sum(axis=-1)
    freedom = (runs - 1) * np.where(squares > 0, _ratio_or_zero(total**2, squares), 1.0)
    mean = scores.mean(axis=(-2, -1))
    return EstimateMoments(mean, np.sqrt(variance), _ratio_or_zero(third, variance**1.5), freedom)


def skew_corrected_t_bounds(
    moments: EstimateMoments, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return lower and upper bounds [...] of a mean from its moments.

    Each bound is that of Student's t interval or that of Hall's (1992) cubic transformation,
    whichever is farther from the mean. The transformation shifts the bounds toward the long tail,
    because the coverage of Student's 95% interval alone is only 83 to 90% for the mean of a few
    strongly skewed values. Let n be
    the number of degrees of freedom plus one. The sample skewness underestimates the skewness of
    the population, so it is multiplied by 1.25 + 6 / n. The distance from the mean to a bound is
    limited to 2 + 5 / n times the distance for Student's t interval.
    """
    units = moments.freedom + 1
    quantile = special.stdtrit(moments.freedom, (1 + level) / 2)
    longest = (2 + 5 / units) * quantile
    a = moments.skewness * (1.25 + 6 / units)
    below = np.clip(_invert_hall_transformation(quantile, a), quantile, longest)
    above = np.clip(-_invert_hall_transformation(-quantile, a), quantile, longest)
    return moments.mean - moments.error * below, moments.mean + moments.error * above


def _invert_hall_transformation(target: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Solve Hall's transformation T + a T^2 / 3 + a^2 T^3 / 27 + a / 6 = `target` for T.

    `a` is the skewness of the mean.
    """
    small = np.abs(a) < 1e-6
    safe = np.where(small, 1.0, a)
    root = 3 / safe * (np.cbrt(1 + safe * (target - safe / 6)) - 1)
    return np.where(small, target, root)


def _ratio_or_zero(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return numerator / denominator, or 0 where the denominator is not positive."""
    safe = np.where(denominator > 0, denominator, 1.0)
    return np.where(denominator > 0, numerator / safe, 0.0)
