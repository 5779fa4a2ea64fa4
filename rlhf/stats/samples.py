"""Estimate the result of drawing several samples for one prompt: pass@k and best-of-n."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from rlhf.stats.units import finite_vector


def pass_at_k(k: int, *, correct: int, drawn: int) -> float:
    """Return the unbiased estimate of pass@k: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    n is `drawn`, c is `correct`; pass@k is the probability that one of k samples is correct.

    Raises:
        ValueError: fewer than k samples were drawn, or more are correct than drawn.
    """
    if not 0 <= correct <= drawn or not 1 <= k <= drawn:
        raise ValueError(f"pass@{k} needs between 1 and {drawn} samples, the number drawn")
    return 1.0 - math.comb(drawn - correct, k) / math.comb(drawn, k)


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> float:
    """Return the expected gold score of the sample with the highest proxy score among n of N.

    The estimate is unbiased: the exact average over all C(N, n) subsets (Nakano et al. 2021,
    appendix I). Samples with equal proxy scores are equally likely to be chosen. Both scores have
    shape [N].
    """
    ranking, score = finite_vector(proxy), finite_vector(gold)
    size = ranking.size
    if size != score.size or not 1 <= n <= size:
        raise ValueError(f"need equal lengths and 1 <= n <= {size}, got {score.size} and n={n}")
    order = np.argsort(ranking, kind="stable")
    _, ties = np.unique(ranking[order], return_inverse=True)
    tied_mean = np.bincount(ties, weights=score[order]) / np.bincount(ties)
    return float(_best_weights(size, n) @ tied_mean[ties])


@lru_cache(maxsize=256)
def _best_weights(size: int, n: int) -> np.ndarray:
    """Return P(rank r is the best of n) = C(r, n - 1) / C(size, n) for each rank r, [size]."""
    weights = np.zeros(size)
    ranks = np.arange(size - 1, n - 1, -1)
    factors: np.ndarray = np.r_[n / size, (ranks - n + 1) / ranks]
    weights[n - 1 :] = np.cumprod(factors)[::-1]
    return weights
