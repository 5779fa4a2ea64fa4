"""The few statistics that a reward report needs, in numpy; prompts are the unit of resampling."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

_CHUNK = 200  # bootstrap repetitions held in memory at once


def cluster_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """Mean of ``values`` [N] with a percentile bootstrap interval over whole ``groups`` [N].

    Pairs of one prompt are not independent, so prompts are drawn with replacement, all their pairs
    with them. Few groups make a percentile interval too short: it is stretched about the mean by
    sqrt(G / (G - 1)) t / z. Returns ``value``, ``low``, ``high``, ``n`` (values) and ``groups``;
    the interval of fewer than two groups is unknown (nan).
    """
    x = np.asarray(values, dtype=float)
    index = group_index(groups)
    num_groups = int(index.max()) + 1 if len(index) else 0
    mean = float(x.mean()) if len(x) else float("nan")
    result: dict[str, float] = {"value": mean, "n": len(x)}
    if num_groups < 2:
        return result | {"low": float("nan"), "high": float("nan"), "groups": num_groups}
    sums = np.bincount(index, weights=x, minlength=num_groups)
    sizes = np.bincount(index, minlength=num_groups).astype(float)
    rng = np.random.default_rng(seed)
    shares = np.full(num_groups, 1 / num_groups)
    means = []
    for start in range(0, resamples, _CHUNK):
        drawn = rng.multinomial(num_groups, shares, size=min(_CHUNK, resamples - start))
        means.append((drawn @ sums) / (drawn @ sizes))
    tail = (1 - confidence) / 2
    stretch = math.sqrt(num_groups / (num_groups - 1)) * _t_over_z(1 - tail, num_groups - 1)
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail]) - result["value"]
    ends = {"low": result["value"] + stretch * float(low)}
    ends |= {"high": result["value"] + stretch * float(high)}
    return result | ends | {"groups": num_groups}


def share_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable],
    *,
    confidence: float = 0.95,
) -> dict[str, float]:
    """Mean of ``values`` [N] in [0, 1] (wins, ties one half) with an interval inside [0, 1].

    Wilson's score interval on the effective number of values: p (1 - p) over the variance of the
    mean between ``groups``, lessened by (z / t)^2 (Korn & Graubard 1998; Dean & Pagano 2015). It
    stays honest where every pair is right, and a bootstrap would show no doubt at all: there the
    groups count. Keys as :func:`cluster_interval`.
    """
    x = np.asarray(values, dtype=float)
    index = group_index(groups)
    num_groups = int(index.max()) + 1 if len(index) else 0
    p = float(x.mean()) if len(x) else float("nan")
    result: dict[str, float] = {"value": p, "n": len(x), "groups": num_groups}
    if num_groups < 2:
        return result | {"low": float("nan"), "high": float("nan")}
    sums = np.bincount(index, weights=x - p, minlength=num_groups)
    variance = num_groups / (num_groups - 1) * float((sums**2).sum()) / len(x) ** 2
    size = min(p * (1 - p) / variance, len(x)) if variance > 0 else num_groups
    tail = (1 + confidence) / 2
    size /= _t_over_z(tail, num_groups - 1) ** 2
    z = NormalDist().inv_cdf(tail)
    centre = (p + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size))
    return result | {"low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def _t_over_z(tail: float, df: int) -> float:
    """Quantile of Student's t over that of the normal, by the expansion of Fisher and Cornish.

    Within 0.1% from 3 degrees of freedom on at the usual levels (Abramowitz & Stegun 26.7.5).
    """
    z = NormalDist().inv_cdf(tail)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return 1 + sum(term / df ** (k + 1) for k, term in enumerate(terms)) / z


def group_index(groups: Sequence[Hashable]) -> np.ndarray:
    """Group of each row as a number from 0, in order of first appearance. [N]"""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(group, len(seen)) for group in groups], dtype=int)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean rank. [N]"""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation; nan if one side is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; nan if one side is constant."""
    return pearson(ranks(np.asarray(a)), ranks(np.asarray(b)))
