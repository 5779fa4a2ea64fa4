"""Statistics against hand-worked numbers, brute force and simulated truth."""

import itertools

import numpy as np
import pytest

from rlhf.stats import aggregates as st
from rlhf.stats import interval, share_interval
from rlhf.stats.samples import best_of_n

# 4 runs x 3 tasks. Sorted: .0 .1 .2 | .3 .4 .5 .5 .6 .7 | .8 .9 1.2
SCORES = np.array([[0.1, 0.5, 1.2], [0.3, 0.4, 0.9], [0.2, 0.6, 0.8], [0.0, 0.5, 0.7]])
OTHER = np.array([[0.2, 0.5, 1.0], [0.2, 0.3, 1.3]])


def test_aggregates_equal_rliable_formulas():
    assert st.mean(SCORES) == pytest.approx(6.2 / 12)
    # 12 // 4 = 3 cut on each side: (.3 + .4 + .5 + .5 + .6 + .7) / 6
    assert st.iqm(SCORES) == pytest.approx(0.5)
    # only 1.2 is clipped to 1: 1 - 6.0 / 12
    assert st.optimality_gap(SCORES) == pytest.approx(0.5)
    assert st.performance_profile(SCORES, [0.0, 0.5, 1.0]) == pytest.approx(
        [11 / 12, 5 / 12, 1 / 12]
    )


def test_iqm_cuts_whole_values_only():
    # 5 values, 5 // 4 = 1 cut on each side: (1 + 2 + 30) / 3
    assert st.iqm(np.array([[0.0], [1], [2], [30], [90]])) == pytest.approx(11.0)


def test_probability_of_improvement_by_hand():
    # task 1: .1 .3 .2 .0 against .2 .2: wins 0, 2, 1, 0 of 2 (ties half) = 3/8
    # task 2: .5 .4 .6 .5 against .5 .3: 1.5, 1, 2, 1.5 = 6/8
    # task 3: 1.2 .9 .8 .7 against 1.0 1.3: 1, 0, 0, 0 = 1/8
    assert st.probability_of_improvement(SCORES, OTHER) == pytest.approx((3 + 6 + 1) / 24)


def test_aggregates_keep_leading_axes():
    stacked = np.stack([SCORES, SCORES + 1])
    for statistic in (st.mean, st.iqm):
        point = 6.2 / 12 if statistic is st.mean else 0.5
        np.testing.assert_allclose(statistic(stacked), [point, point + 1])


@pytest.mark.parametrize("seed", range(4))
def test_best_of_n_is_the_average_over_subsets(seed: int):
    rng = np.random.default_rng(seed)
    proxy, gold = rng.integers(0, 4, 7).astype(float), rng.normal(size=7)
    for n in range(1, 8):
        best = []
        for chosen in itertools.combinations(range(7), n):
            top = max(proxy[i] for i in chosen)
            best.append(np.mean([gold[i] for i in chosen if proxy[i] == top]))
        # Within a subset ties share evenly; over all subsets that is the uniform tie-break.
        assert best_of_n(proxy, gold, n) == pytest.approx(np.mean(best))


def test_bootstrap_is_a_function_of_the_generator():
    scores = np.random.default_rng(0).normal(size=(6, 3))
    first, second, third = (
        st.aggregate_interval(scores, st.iqm, rng=np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert first == second != third


def test_improvement_interval_is_that_of_a_share_of_runs():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(5, 1)) + 9, rng.normal(size=(6, 1))
    found = st.improvement_probability_interval(first, second)
    share = share_interval(5, 5)
    assert (found.value, found.low, found.high) == (1.0, share.low, 1.0)
    assert found.low == pytest.approx(0.05**0.2)
    wide = st.improvement_probability_interval(np.tile(first, 4), np.tile(second, 4))
    assert wide.low == pytest.approx(0.05**0.05)
    few = st.improvement_probability_interval(SCORES, OTHER)
    assert not few.known
    assert few.needs == "2 runs, an interval needs 5"


def test_aggregates_of_few_runs_say_how_many_an_interval_needs():
    for statistic in (st.iqm, st.mean, st.optimality_gap):
        found = st.aggregate_interval(SCORES, statistic, rng=np.random.default_rng(0))
        assert found.value == pytest.approx(float(statistic(SCORES)))
        assert found.needs == "4 runs, an interval needs 5"


def test_the_mean_of_one_task_is_that_of_its_runs():
    scores = np.random.default_rng(2).normal(size=(9, 1))
    found = st.aggregate_interval(scores, st.mean, rng=np.random.default_rng(0))
    plain = interval(scores[:, 0], kind="mean")
    assert (found.low, found.high) == (pytest.approx(plain.low), pytest.approx(plain.high))


def test_sample_efficiency_is_one_estimate_a_step():
    curves = np.random.default_rng(4).normal(size=(6, 3))[:, :, None] + np.arange(5)
    band = st.iqm_intervals_by_step(curves, rng=np.random.default_rng(0))
    assert np.diff([e.value for e in band]) == pytest.approx([1.0] * 4)
    assert [e.high - e.value for e in band] == pytest.approx([band[0].high - band[0].value] * 5)


def test_other_misuse_is_refused():
    with pytest.raises(ValueError, match="runs, tasks"):
        st.iqm(np.zeros(3))
    with pytest.raises(ValueError, match="at least one step"):
        st.iqm_intervals_by_step(np.zeros((6, 3, 0)), rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="same number of tasks"):
        st.probability_of_improvement(SCORES, SCORES[:, :2])


@pytest.mark.parametrize("statistic", [st.mean, st.iqm, st.optimality_gap])
def test_runs_that_all_reach_the_optimum_have_no_interval(statistic) -> None:
    """Runs of 1 with 90%, else uniform: a mean of 0.95, but 59% of samples of five are all 1."""
    solved = st.aggregate_interval(np.ones((5, 3)), statistic, rng=np.random.default_rng(0))
    assert not solved.known
    assert solved.needs == "all 5 runs have the same value, so the variance cannot be estimated"
    rng = np.random.default_rng(1)
    for _ in range(300):
        scores = np.where(rng.random((5, 2)) < 0.9, 1.0, rng.random((5, 2)))
        found = st.aggregate_interval(scores, statistic, rng=rng, repetitions=50)
        assert not found.known or found.low < found.high


def test_an_optimality_gap_is_not_negative() -> None:
    scores = np.array([[1.0, 0.99, 0.98, 0.6, 1.1, 1.0]]).T
    found = st.aggregate_interval(scores, st.optimality_gap, rng=np.random.default_rng(0))
    assert found.low == 0
    assert found.value == pytest.approx((0.01 + 0.02 + 0.4) / 6)
