"""Benchmark aggregates with intervals.

Scores of a benchmark are arrays [..., runs, tasks]; leading axes (bootstrap repetitions) are kept.
The aggregates are those of Agarwal et al. (2021), "Deep RL at the Edge of the Statistical
Precipice", and equal those of rliable.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from rlhf.stats.means import SKEW_CORRECTED_T, bounds_from, stratified_moments
from rlhf.stats.result import Interval
from rlhf.stats.shares import share_interval
from rlhf.stats.units import no_interval_reason, require_finite, too_few_units

Statistic = Callable[[np.ndarray], np.ndarray]
"""[..., runs, tasks] -> [...]"""

REPETITIONS = 2000
"""Bootstrap repetitions."""


def aggregate_interval(
    scores: ArrayLike,
    statistic: Statistic,
    *,
    rng: np.random.Generator,
    repetitions: int = REPETITIONS,
    level: float = 0.95,
) -> Interval:
    """Return `statistic` of scores [runs, tasks] with an interval over the runs of each task.

    The interval of the mean and of the optimality gap is that of a mean of (clipped) scores. The
    interval of other statistics is a stretched bootstrap interval; runs are resampled within each
    task.
    """
    table = _table(scores)
    runs = table.shape[0]
    if statistic in (mean, optimality_gap):
        values = table if statistic is mean else 1.0 - np.minimum(table, 1.0)
        if missing := _no_interval_reason(values):
            return Interval.without(float(values.mean()), runs, missing)
        moments = stratified_moments(values)
        low, high = map(float, bounds_from(moments, level=level))
        low = low if statistic is mean else max(0.0, low)
        return Interval(float(moments.mean), low, high, runs, SKEW_CORRECTED_T)
    return _bootstrap(table, statistic, _resampled_runs(table, rng, repetitions), level)


def sample_efficiency(
    curves: ArrayLike,
    *,
    rng: np.random.Generator,
    repetitions: int = REPETITIONS,
    level: float = 0.95,
) -> list[Interval]:
    """Return the interquartile mean at each step of curves [runs, tasks, steps].

    Whole curves are resampled, so all steps use the same runs and the band is smooth.
    """
    data = np.asarray(curves, dtype=float)
    if data.ndim != 3:
        raise ValueError(f"curves must be [runs, tasks, steps], got shape {data.shape}")
    tables = [_table(data[:, :, step]) for step in range(data.shape[2])]
    runs = _resampled_runs(tables[0], rng, repetitions)
    return [_bootstrap(table, iqm, runs, level) for table in tables]


def stretched_interval(
    value: float, replicates: np.ndarray, units: int, freedom: float, level: float = 0.95
) -> Interval:
    """Return the percentile interval of bootstrap replicates [repetitions], widened for small n.

    A percentile interval over 5 units has a coverage of 83 to 91%. It is widened about the point
    estimate by sqrt(n / (n - 1)) t / z with n `units` and `freedom` degrees of freedom of t, which
    for a mean of one task gives the t interval. There is no interval for fewer than five units.
    """
    if missing := too_few_units(units):
        return Interval.without(value, units, missing)
    tail = (1 + level) / 2
    stretch = math.sqrt(units / (units - 1)) * special.stdtrit(freedom, tail) / special.ndtri(tail)
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
    return _scores(scores).mean(axis=(-2, -1))


def iqm(scores: ArrayLike) -> np.ndarray:
    """Return the mean of the middle half of all scores, [..., runs, tasks] -> [...]."""
    table = _scores(scores)
    flat = table.reshape(*table.shape[:-2], -1)
    first = flat.shape[-1] // 4
    last = flat.shape[-1] - first
    return np.partition(flat, (first, last - 1), axis=-1)[..., first:last].mean(axis=-1)


def optimality_gap(scores: ArrayLike) -> np.ndarray:
    """Return the mean of 1 - min(score, 1), [..., runs, tasks] -> [...]."""
    return 1.0 - np.minimum(_scores(scores), 1.0).mean(axis=(-2, -1))


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
    """Return the share of scores above each threshold, [..., runs, tasks] -> [..., thresholds]."""
    table = _scores(scores)
    above = table[..., None] > np.asarray(thresholds, dtype=float)
    return above.mean(axis=(-3, -2))


def probability_of_improvement(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Return P(a score of `first` exceeds one of `second`), a mean over tasks; ties count half.

    The numbers of runs may differ: [..., runs, tasks] and [..., other runs, tasks] -> [...].
    """
    left, right = _scores(first), _scores(second)
    if left.shape[-1] != right.shape[-1]:
        raise ValueError(f"tasks differ: {left.shape[-1]} and {right.shape[-1]}")
    delta = left[..., :, None, :] - right[..., None, :, :]
    return (0.5 * (np.sign(delta) + 1)).mean(axis=(-3, -2, -1))


def improvement_interval(first: ArrayLike, second: ArrayLike, *, level: float = 0.95) -> Interval:
    """Return `probability_of_improvement` with an exact interval inside [0, 1].

    In each task, the variance is at most that of a share of n runs, with n the smaller of the two
    numbers of runs (Birnbaum & Klose 1957). The interval is that of such a share.
    """
    left, right = _table(first), _table(second)
    probability = float(probability_of_improvement(left, right))
    runs = min(left.shape[0], right.shape[0])
    if missing := too_few_units(runs):
        return Interval.without(probability, runs, missing.replace("unit", "run"))
    units = runs * left.shape[1]
    share = share_interval(probability * units, units, level=level)
    return Interval(probability, share.low, share.high, runs, share.method)


def _bootstrap(table: np.ndarray, statistic: Statistic, runs: np.ndarray, level: float) -> Interval:
    """Return the stretched interval of a statistic; `runs` is [repetitions, runs, tasks]."""
    count = table.shape[0]
    if missing := _no_interval_reason(table):
        return Interval.without(float(statistic(table)), count, missing)
    replicates = statistic(np.take_along_axis(table[None], runs, axis=1))
    freedom = float(stratified_moments(table).freedom)
    return stretched_interval(float(statistic(table)), replicates, count, freedom, level)


def _no_interval_reason(table: np.ndarray) -> str:
    """Return the reason why scores [runs, tasks] have no interval; empty if they have one."""
    return no_interval_reason(table.mean(axis=1)).replace("unit", "run")


def _resampled_runs(table: np.ndarray, rng: np.random.Generator, repetitions: int) -> np.ndarray:
    """Return indices of resampled runs, drawn for each task, [repetitions, runs, tasks]."""
    return rng.integers(0, table.shape[0], size=(repetitions, *table.shape))


def _table(scores: ArrayLike) -> np.ndarray:
    data = np.asarray(scores, dtype=float)
    if data.ndim != 2 or data.size == 0:
        raise ValueError(f"scores must be a non-empty [runs, tasks], got shape {data.shape}")
    return require_finite(data)


def _scores(scores: ArrayLike) -> np.ndarray:
    data = np.asarray(scores, dtype=float)
    if data.ndim < 2:
        raise ValueError(f"scores must be [..., runs, tasks], got shape {data.shape}")
    return data
