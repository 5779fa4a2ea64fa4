"""Aggregates of a benchmark, and what repeated samples say: point estimates with their intervals.

Scores of a benchmark are arrays [..., runs, tasks]; leading axes (bootstrap repetitions) are kept.
Aggregates are those of Agarwal et al. (2021), "Deep RL at the Edge of the Statistical Precipice".
The intervals are those of `rlhf.stats`.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from rlhf.stats import (
    Interval,
    fewest_needed,
    moment_interval,
    share_interval,
    stratified_moments,
    stretched_interval,
)

Statistic = Callable[[np.ndarray], np.ndarray]
"""[..., runs, tasks] -> [...]"""


def aggregate_interval(
    scores: ArrayLike,
    statistic: Statistic,
    *,
    rng: np.random.Generator,
    repetitions: int = 2000,
    level: float = 0.95,
) -> Interval:
    """`statistic` of scores [runs, tasks] with an interval over the runs of each task.

    The mean and the optimality gap are means of the scores or of capped ones, and have the interval
    of a mean. Others have a stretched bootstrap that redraws the runs within each task.
    """
    table = _table(scores)
    point, runs = float(statistic(table)), table.shape[0]
    if missing := fewest_needed(runs):
        return Interval.without(point, runs, missing.replace("unit", "run"))
    if statistic is mean:
        return moment_interval(stratified_moments(table), runs, level=level)
    if statistic is optimality_gap:
        below = 1.0 - np.minimum(table, 1.0)
        return moment_interval(stratified_moments(below), runs, level=level)
    replicates = statistic(_resampled(table, rng, repetitions))
    return stretched_interval(point, replicates, runs, _degrees_of_freedom(table), level)


def mean(scores: ArrayLike) -> np.ndarray:
    """Mean over runs and tasks. [..., runs, tasks] -> [...]"""
    return _scores(scores).mean(axis=(-2, -1))


def median(scores: ArrayLike) -> np.ndarray:
    """Median over tasks of the mean over runs. [..., runs, tasks] -> [...]"""
    return np.median(_scores(scores).mean(axis=-2), axis=-1)


def iqm(scores: ArrayLike) -> np.ndarray:
    """Interquartile mean: middle half of all runs x tasks. [..., runs, tasks] -> [...]"""
    table = _scores(scores)
    flat = table.reshape(*table.shape[:-2], -1)
    cut = flat.shape[-1] // 4
    last = flat.shape[-1] - cut
    return np.partition(flat, (cut, last - 1), axis=-1)[..., cut:last].mean(axis=-1)


def optimality_gap(scores: ArrayLike, *, target: float = 1.0) -> np.ndarray:
    """Mean shortfall below `target`; what exceeds it earns nothing. [..., runs, tasks] -> [...]"""
    return target - np.minimum(_scores(scores), target).mean(axis=(-2, -1))


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
    """Share of runs scoring above each threshold. [..., runs, tasks] -> [..., thresholds]"""
    table = _scores(scores)
    above = table[..., None] > np.asarray(thresholds, dtype=float)
    return above.mean(axis=(-3, -2))


def probability_of_improvement(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """P(a run of `first` beats one of `second`), ties half, averaged over tasks.

    Runs may differ in number: [..., runs, tasks] and [..., other runs, tasks] -> [...].
    """
    left, right = _scores(first), _scores(second)
    if left.shape[-1] != right.shape[-1]:
        raise ValueError(f"tasks differ: {left.shape[-1]} and {right.shape[-1]}")
    delta = left[..., :, None, :] - right[..., None, :, :]
    return (0.5 * (np.sign(delta) + 1)).mean(axis=(-3, -2, -1))


def improvement_interval(first: ArrayLike, second: ArrayLike, *, level: float = 0.95) -> Interval:
    """`probability_of_improvement` with an exact interval inside [0, 1].

    Of all pairs of distributions with one probability those of the largest spread give it the
    variance of a share of as many runs as the smaller side has (Birnbaum & Klose 1957), in each
    task: the interval is that of such a share.
    """
    left, right = _table(first), _table(second)
    point = float(probability_of_improvement(left, right))
    runs = min(left.shape[0], right.shape[0])
    if missing := fewest_needed(runs):
        return Interval.without(point, runs, missing.replace("unit", "run"))
    units = runs * left.shape[1]
    found = share_interval(point * units, units, level=level)
    return Interval(point, found.low, found.high, runs, found.method)


def sample_efficiency(
    curves: ArrayLike,
    statistic: Statistic = iqm,
    *,
    rng: np.random.Generator,
    repetitions: int = 2000,
    level: float = 0.95,
) -> list[Interval]:
    """One estimate per training step of curves [runs, tasks, steps].

    Whole curves are redrawn, so neighbouring steps share their runs and the band is smooth.
    """
    data = np.asarray(curves, dtype=float)
    if data.ndim != 3:
        raise ValueError(f"curves must be [runs, tasks, steps], got shape {data.shape}")
    drawn = rng.integers(0, data.shape[0], size=(repetitions, *data.shape[:2]))
    estimates = []
    for step in range(data.shape[2]):
        table = _table(data[:, :, step])
        replicates = statistic(np.take_along_axis(table[None], drawn, axis=1))
        df = _degrees_of_freedom(table)
        point = float(statistic(table))
        estimates.append(stretched_interval(point, replicates, table.shape[0], df, level))
    return estimates


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> float:
    """Expected gold score of the reply with the highest proxy among n drawn from all N samples.

    Unbiased: averages over all C(N, n) subsets exactly (Nakano et al. 2021, appendix I). Replies of
    equal proxy are equally likely to be chosen.
    """
    by, score = _vector(proxy), _vector(gold)
    if by.size != score.size or not 1 <= n <= by.size:
        raise ValueError(f"need equal lengths and 1 <= n <= {by.size}, got {score.size} and n={n}")
    order = np.argsort(by, kind="stable")
    weights = _best_weights(by.size, n)
    _, ties = np.unique(by[order], return_inverse=True)
    tied_mean = np.bincount(ties, weights=score[order]) / np.bincount(ties)
    return float(weights @ tied_mean[ties])


@lru_cache(maxsize=256)
def _best_weights(size: int, n: int) -> np.ndarray:
    """P(the sample of each rank, from 0, is the best of n): C(rank, n - 1) / C(size, n)."""
    weights = np.zeros(size)
    ranks = np.arange(size - 1, n - 1, -1)
    falling = np.cumprod(np.r_[n / size, (ranks - n + 1) / ranks])
    weights[n - 1 :] = falling[::-1]
    return weights


def _resampled(table: np.ndarray, rng: np.random.Generator, repetitions: int) -> np.ndarray:
    drawn = rng.integers(0, table.shape[0], size=(repetitions, *table.shape))
    return np.take_along_axis(table[None], drawn, axis=1)


def _degrees_of_freedom(table: np.ndarray) -> float:
    """Satterthwaite's degrees of freedom of a mean over tasks whose variances differ."""
    runs = table.shape[0]
    if runs == 1:
        return 1.0
    variances = table.var(axis=0, ddof=1)
    squares = float((variances**2).sum())
    return (runs - 1) * float(variances.sum()) ** 2 / squares if squares > 0 else runs - 1.0


def _vector(values: ArrayLike) -> np.ndarray:
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"need a non-empty list of numbers, got shape {data.shape}")
    return _finite(data)


def _table(scores: ArrayLike) -> np.ndarray:
    data = np.asarray(scores, dtype=float)
    if data.ndim != 2 or data.size == 0:
        raise ValueError(f"scores must be a non-empty [runs, tasks], got shape {data.shape}")
    return _finite(data)


def _scores(scores: ArrayLike) -> np.ndarray:
    data = np.asarray(scores, dtype=float)
    if data.ndim < 2:
        raise ValueError(f"scores must be [..., runs, tasks], got shape {data.shape}")
    return data


def _finite(data: np.ndarray) -> np.ndarray:
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise ValueError(f"{bad} of {data.size} values are not finite; drop or repair them first")
    return data
