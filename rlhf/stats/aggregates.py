"""Compute the aggregates of a benchmark's scores, with confidence intervals.

Scores are arrays [..., runs, tasks]. An aggregate reduces the last two axes and keeps the leading
axes, such as bootstrap repetitions. The aggregates are those of Agarwal et al. (2021), "Deep RL at
the Edge of the Statistical Precipice", and have the same values as in the package rliable.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from rlhf.stats.means import SKEW_CORRECTED_T, run_and_task_mean_moments, skew_corrected_t_bounds
from rlhf.stats.result import Interval
from rlhf.stats.shares import share_interval
from rlhf.stats.units import no_interval_reason, require_finite, too_few_units_reason

Statistic = Callable[[np.ndarray], np.ndarray]
"""Function that maps scores [..., runs, tasks] to aggregates [...]."""

REPETITIONS = 2000
"""Default number of bootstrap repetitions."""


def aggregate_interval(
    scores: ArrayLike,
    statistic: Statistic,
    *,
    rng: np.random.Generator,
    repetitions: int = REPETITIONS,
    level: float = 0.95,
) -> Interval:
    """Return `statistic` of scores [runs, tasks] with an interval over the runs of each task.

    The mean and the optimality gap are means of scores or of clipped scores, so their interval is
    Student's t interval, corrected for skewness. Other statistics have the bootstrap interval of
    `widened_bootstrap_interval`. The bootstrap resamples the runs of each task separately.

    Raises:
        ValueError: `scores` is empty, not two-dimensional, or contains values that are not finite.
    """
    table = _checked_table(scores)
    runs = table.shape[0]
    if statistic in (mean, optimality_gap):
        values = table if statistic is mean else 1.0 - np.minimum(table, 1.0)
        if missing := _no_run_interval_reason(values):
            return Interval.without_bounds(float(values.mean()), runs, missing)
        moments = run_and_task_mean_moments(values)
        low, high = map(float, skew_corrected_t_bounds(moments, level=level))
        low = low if statistic is mean else max(0.0, low)
        return Interval(float(moments.mean), low, high, runs, SKEW_CORRECTED_T)
    return _bootstrap_interval(
        table, statistic, _resampled_run_indices(table, rng, repetitions), level
    )


def iqm_intervals_by_step(
    curves: ArrayLike,
    *,
    rng: np.random.Generator,
    repetitions: int = REPETITIONS,
    level: float = 0.95,
) -> list[Interval]:
    """Return the interquartile mean at each step of curves [runs, tasks, steps], with intervals.

    The bootstrap resamples whole curves: all steps use the same resampled runs, so that the band of
    the intervals is smooth.

    Raises:
        ValueError: `curves` does not have three axes, has an empty axis, or contains values that
            are not finite.
    """
    data = np.asarray(curves, dtype=float)
    if data.ndim != 3 or not data.shape[2]:
        raise ValueError(
            f"curves must be [runs, tasks, steps] with at least one step, got shape {data.shape}"
        )
    tables = [_checked_table(data[:, :, step]) for step in range(data.shape[2])]
    runs = _resampled_run_indices(tables[0], rng, repetitions)
    return [_bootstrap_interval(table, iqm, runs, level) for table in tables]


def widened_bootstrap_interval(
    value: float, replicates: np.ndarray, units: int, degrees_of_freedom: float, level: float = 0.95
) -> Interval:
    """Return the percentile interval of bootstrap replicates, widened for small numbers of units.

    A percentile interval over 5 units has a coverage of only 83 to 91%. The distances of its bounds
    from the point estimate are therefore multiplied by sqrt(n / (n - 1)) t / z. n is `units`, and t
    and z are the quantiles of Student's t distribution and of the normal distribution. For the mean
    of one task, the result is approximately Student's t interval.

    Args:
        value: Point estimate.
        replicates: Value of the statistic for each bootstrap sample, [repetitions].
        units: Number of independent units; there is no interval for fewer than five.
        degrees_of_freedom: Degrees of freedom of Student's t distribution.
        level: Confidence level.
    """
    if missing := too_few_units_reason(units):
        return Interval.without_bounds(value, units, missing)
    tail = (1 + level) / 2
    stretch = (
        math.sqrt(units / (units - 1))
        * special.stdtrit(degrees_of_freedom, tail)
        / special.ndtri(tail)
    )
    low, high = np.quantile(replicates, [1 - tail, tail])
    return Interval(
        float(value),
        float(value - stretch * (value - low)),
        float(value + stretch * (high - value)),
        units,
        "bootstrap, stretched",
    )


def mean(scores: ArrayLike) -> np.ndarray:
    """Return the mean over runs and tasks, [..., runs, tasks] -> [...]."""
    return _score_array(scores).mean(axis=(-2, -1))


def iqm(scores: ArrayLike) -> np.ndarray:
    """Return the interquartile mean: the mean of the middle half of all scores.

    Shapes: [..., runs, tasks] -> [...].
    """
    table = _score_array(scores)
    flat = table.reshape(*table.shape[:-2], -1)
    first = flat.shape[-1] // 4
    last = flat.shape[-1] - first
    return np.partition(flat, (first, last - 1), axis=-1)[..., first:last].mean(axis=-1)


def optimality_gap(scores: ArrayLike) -> np.ndarray:
    """Return the mean of 1 - min(score, 1), [..., runs, tasks] -> [...]."""
    return 1.0 - np.minimum(_score_array(scores), 1.0).mean(axis=(-2, -1))


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
    """Return the proportion of scores above each threshold.

    Shapes: [..., runs, tasks] -> [..., thresholds].
    """
    table = _score_array(scores)
    above = table[..., None] > np.asarray(thresholds, dtype=float)
    return above.mean(axis=(-3, -2))


def probability_of_improvement(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Return the probability that a score of `first` exceeds a score of `second` on the same task.

    The result is the mean over tasks; ties count half. `first` and `second` may have different
    numbers of runs. Shapes: [..., runs, tasks] and [..., other runs, tasks] -> [...].

    Raises:
        ValueError: The numbers of tasks differ.
    """
    left, right = _score_array(first), _score_array(second)
    if left.shape[-1] != right.shape[-1]:
        raise ValueError(
            f"both need the same number of tasks, got {left.shape[-1]} and {right.shape[-1]}"
        )
    delta = left[..., :, None, :] - right[..., None, :, :]
    return (0.5 * (np.sign(delta) + 1)).mean(axis=(-3, -2, -1))


def improvement_probability_interval(
    first: ArrayLike, second: ArrayLike, *, level: float = 0.95
) -> Interval:
    """Return `probability_of_improvement` of scores [runs, tasks], with an interval in [0, 1].

    Let n be the smaller of the two numbers of runs. In each task, the variance of the estimate is
    at most the variance of a proportion in n runs (Birnbaum & Klose 1957). The interval is
    therefore the exact interval of a proportion with n outcomes for each task. There is no interval
    if n is less than 5.

    Raises:
        ValueError: The numbers of tasks differ, or an argument is invalid as in
            `aggregate_interval`.
    """
    left, right = _checked_table(first), _checked_table(second)
    probability = float(probability_of_improvement(left, right))
    runs = min(left.shape[0], right.shape[0])
    if missing := too_few_units_reason(runs):
        return Interval.without_bounds(probability, runs, missing.replace("unit", "run"))
    units = runs * left.shape[1]
    share = share_interval(probability * units, units, level=level)
    return Interval(probability, share.low, share.high, runs, share.method)


def _bootstrap_interval(
    table: np.ndarray, statistic: Statistic, run_indices: np.ndarray, level: float
) -> Interval:
    """Return the stretched bootstrap interval of a statistic of scores [runs, tasks].

    `run_indices` [repetitions, runs, tasks] is the result of `_resampled_run_indices`.
    """
    count = table.shape[0]
    if missing := _no_run_interval_reason(table):
        return Interval.without_bounds(float(statistic(table)), count, missing)
    replicates = statistic(np.take_along_axis(table[None], run_indices, axis=1))
    freedom = float(run_and_task_mean_moments(table).freedom)
    return widened_bootstrap_interval(float(statistic(table)), replicates, count, freedom, level)


def _no_run_interval_reason(table: np.ndarray) -> str:
    """Return why scores [runs, tasks] have no interval, or an empty string if they have one."""
    return no_interval_reason(table.mean(axis=1)).replace("unit", "run")


def _resampled_run_indices(
    table: np.ndarray, rng: np.random.Generator, repetitions: int
) -> np.ndarray:
    """Return the indices of resampled runs, drawn separately for each task.

    Shapes: [runs, tasks] -> [repetitions, runs, tasks].
    """
    return rng.integers(0, table.shape[0], size=(repetitions, *table.shape))


def _checked_table(scores: ArrayLike) -> np.ndarray:
    """Return scores as an array [runs, tasks].

    Raises:
        ValueError: The array is empty or not two-dimensional, or some scores are not finite.
    """
    data = np.asarray(scores, dtype=float)
    if data.ndim != 2 or data.size == 0:
        raise ValueError(f"scores must be a non-empty array [runs, tasks], got shape {data.shape}")
    return require_finite(data)


def _score_array(scores: ArrayLike) -> np.ndarray:
    """Return scores as an array [..., runs, tasks]; raise ValueError for fewer than two axes."""
    data = np.asarray(scores, dtype=float)
    if data.ndim < 2:
        raise ValueError(f"scores must be [..., runs, tasks], got shape {data.shape}")
    return data
