"""Estimate pass@k and best-of-n from several samples for one prompt."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from rlhf.stats.units import require_finite_vector


def pass_at_k(k: int, *, correct: int, drawn: int) -> float:
    """Return the unbiased estimate of pass@k: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    n is `drawn` and c is `correct`. pass@k is the probability that at least one of k samples is
    correct.

    Raises:
        ValueError: k is not between 1 and `drawn`, or `correct` is not between 0 and `drawn`.
    """
    if not 0 <= correct <= drawn or not 1 <= k <= drawn:
        raise ValueError(
            f"pass@{k} needs 1 <= k <= drawn and 0 <= correct <= drawn, got {correct} correct of "
            f"{drawn} drawn"
        )
    return 1.0 - math.comb(drawn - correct, k) / math.comb(drawn, k)


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> float:
    """Return the expected gold score of the best of n samples, selected by the proxy score.

    `proxy` and `gold` are the scores of N samples, [N]. The estimate is unbiased: it is the exact
    average over all C(N, n) subsets of n samples (Nakano et al. 2021, appendix I). Samples with
    equal proxy scores are equally likely to be selected.

    Raises:
        ValueError: The lengths differ, a score is not finite, or `n` is not between 1 and N.
    """
    ranking, score = require_finite_vector(proxy), require_finite_vector(gold)
    size = ranking.size
    if size != score.size or not 1 <= n <= size:
        raise ValueError(
            f"need {size} gold scores, one for each proxy score, and 1 <= n <= {size}, got "
            f"{score.size} gold scores and n = {n}"
        )
    order = np.argsort(ranking, kind="stable")
    _, ties = np.unique(ranking[order], return_inverse=True)
    tied_mean = np.bincount(ties, weights=score[order]) / np.bincount(ties)
    return float(_best_of_n_probabilities(size, n) @ tied_mean[ties])


@lru_cache(maxsize=256)
def _best_of_n_probabilities(size: int, n: int) -> np.ndarray:
    """Return the probability that each sample is the best of a random subset of n samples, [size].

    The samples are sorted by increasing score. The probability is C(r, n - 1) / C(size, n) for the
    sample of rank r = 0, ..., size - 1. The array is cached, so callers must not change it.
    """
    weights = np.zeros(size)
    ranks = np.arange(size - 1, n - 1, -1)
    factors: np.ndarray = np.r_[n / size, (ranks - n + 1) / ranks]
    weights[n - 1 :] = np.cumprod(factors)[::-1]
    return weights
