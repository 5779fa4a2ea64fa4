"""Intervals of areas, correlations and sums: coverage, edges, and hand-worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from rlhf.reward_models.report.intervals import pearson, spearman
from rlhf.reward_models.report.labeled import macro_auc, macro_f1, rmse
from rlhf.stats import Interval, jackknife, share_interval
from rlhf.stats.jackknife import weighted_sum_interval


def covered(make, statistic, truth, scale, *, n, repetitions, seed):
    """Shares of the intervals that hold the truth, and of samples that have none."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    hits = none = 0
    for _ in range(repetitions):
        data = make(rng, n)
        found = jackknife(
            lambda rows, data=data: statistic(*(column[rows] for column in data)),
            np.arange(n),
            scale=scale,
        )
        none += not found.known
        hits += found.known and found.low <= truth <= found.high
    return hits / max(1, repetitions - none), none / repetitions


def two_classes(shift):
    def make(rng, n):
        label = rng.integers(0, 2, n)
        score = rng.normal(size=n) + shift * label
        return np.stack([np.zeros(n), score], 1), label

    return make


def correlated(rho):
    def make(rng, n):
        first = rng.normal(size=n)
        return first, rho * first + math.sqrt(1 - rho**2) * rng.normal(size=n)

    return make


def three_classes(rng, n):
    label = rng.integers(0, 3, n)
    chosen = np.where(rng.random(n) < 0.7, label, rng.integers(0, 3, n))
    return np.eye(3)[chosen], label


CASES = {
    # P(one normal exceeds another that lies `shift` lower) = Phi(shift / sqrt 2)
    "auc": (two_classes(1.0), macro_auc, norm.cdf(1 / math.sqrt(2)), "logit"),
    "auc near 1": (two_classes(2.0), macro_auc, norm.cdf(2 / math.sqrt(2)), "logit"),
    "pearson": (correlated(0.5), pearson, 0.5, "fisher"),
    # Spearman's rho of a normal pair is 6 / pi asin(rho / 2)
    "spearman": (correlated(0.9), spearman, 6 / math.pi * math.asin(0.45), "fisher"),
    # P(right) = 0.7 + 0.3 / 3 in each of three equal classes: precision = recall = 0.8
    "macro F1": (three_classes, macro_f1, 0.8, "logit"),
    "rmse": (lambda rng, n: (rng.normal(size=n), np.zeros(n)), rmse, 1.0, "log"),
}


@pytest.mark.parametrize("name", CASES)
def test_jackknife_intervals_cover(name):
    share, none = covered(*CASES[name], n=40, repetitions=150, seed=3)
    assert share >= 0.89
    assert none <= 0.1


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [20, 40, 100])
def test_jackknife_intervals_cover_at_every_size(name, n):
    share, _none = covered(*CASES[name], n=n, repetitions=4000, seed=n)
    print(name, n, share)
    assert share >= 0.90


def test_copies_of_a_row_are_no_evidence():
    rng = np.random.default_rng(0)
    first, second = correlated(0.5)(rng, 30)
    alone = jackknife(lambda rows: pearson(first[rows], second[rows]), range(30), scale="fisher")
    a, b = np.repeat(first, 4), np.repeat(second, 4)
    copied = jackknife(
        lambda rows: pearson(a[rows], b[rows]), np.repeat(np.arange(30), 4), scale="fisher"
    )
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    assert copied.units == 30


def test_there_is_no_interval_at_the_end_of_the_range_or_with_few_units():
    scores, labels = np.stack([np.zeros(30), np.arange(30)], 1), np.arange(30) >= 15
    perfect = jackknife(
        lambda rows: macro_auc(scores[rows], labels[rows]), range(30), scale="logit"
    )
    assert perfect.value == 1
    assert not perfect.known
    few = jackknife(lambda rows: float(rows.size), range(8))
    assert few.needs == "8 units, an interval needs 20"


def test_a_sum_of_intervals_by_hand():
    parts = [Interval(0.5, 0.4, 0.7, 10), Interval(0.8, 0.5, 0.9, 20)]
    found = weighted_sum_interval(parts, [0.25, 0.75])
    assert found.value == pytest.approx(0.725)
    assert found.low == pytest.approx(0.725 - math.hypot(0.25 * 0.1, 0.75 * 0.3))
    assert found.high == pytest.approx(0.725 + math.hypot(0.25 * 0.2, 0.75 * 0.1))
    assert found.units == 30
    assert not weighted_sum_interval(
        [Interval.without_bounds(0.5, 2, "few"), parts[0]], [0.5, 0.5]
    ).known


@pytest.mark.parametrize(
    ("sizes", "shares", "weights"),
    [((5, 10, 40), (0.9, 0.5, 0.8), (0.2, 0.3, 0.5)), ((10, 10), (0.97, 0.9), (0.5, 0.5))],
)
def test_sums_of_shares_cover(sizes, shares, weights):
    rng = np.random.default_rng(1)
    truth, hits = float(np.dot(shares, weights)), 0
    for _ in range(1000):
        parts = [
            share_interval(float(rng.binomial(n, p)), n) for n, p in zip(sizes, shares, strict=True)
        ]
        found = weighted_sum_interval(parts, weights)
        hits += found.low <= truth <= found.high
    assert hits / 1000 >= 0.93
