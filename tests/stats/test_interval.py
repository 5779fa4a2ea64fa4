"""Intervals against hand-worked numbers and exact sums over all outcomes."""

import math

import numpy as np
import pytest
from scipy import stats

from rlhf.stats import difference, interval, ratio_interval, share_interval
from rlhf.stats.aggregates import widened_bootstrap_interval
from rlhf.stats.means import run_and_task_mean_moments
from rlhf.stats.paired import delta_interval
from rlhf.stats.shares import adjusted_wald_bounds, mid_p_bounds


@pytest.mark.parametrize(("x", "n"), [(0, 4), (4, 4), (7, 8), (1, 20), (10, 20)])
def test_mid_p_bounds_solve_their_equation(x: int, n: int):
    found = share_interval(x, n)
    for p, tail in ((found.low, 0.025), (found.high, 0.975)):
        if 0 < p < 1:
            law = stats.binom(n, p)
            assert (law.sf(x) + law.sf(x - 1)) / 2 == pytest.approx(tail, abs=1e-6)
    assert (found.low == 0) == (x == 0)
    assert (found.high == 1) == (x == n)


def test_shares_at_the_edge_by_hand():
    # All of n right: the mid-p bound solves p^n / 2 = 0.025, so p = 0.05^(1/n).
    assert interval([1.0] * 4, kind="share").low == pytest.approx(0.05**0.25)
    assert interval([1.0] * 8, kind="share").low == pytest.approx(0.05**0.125)
    assert interval([0.0] * 20, kind="share").high == pytest.approx(1 - 0.05 ** (1 / 20))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 13, 20, 50, 100])
def test_shares_are_covered_at_every_truth(n: int):
    """Exactly: the sum over all outcomes at 999 truths."""
    p, x = np.linspace(0.001, 0.999, 999)[:, None], np.arange(n + 1)
    low, high = mid_p_bounds(x.astype(float), n)
    covered = (stats.binom.pmf(x, n, p) * ((low <= p) & (p <= high))).sum(axis=1)
    assert covered.min() >= 0.90
    assert covered.mean() >= 0.94


@pytest.mark.parametrize("n", [2, 3, 5, 8, 20, 40])
def test_paired_shares_are_covered_at_every_truth(n: int):
    """Exactly: the sum over all numbers of gains and losses."""
    gains, losses = (a.ravel().astype(float) for a in np.mgrid[: n + 1, : n + 1])
    keep = gains + losses <= n
    gains, losses = gains[keep], losses[keep]
    low, high = adjusted_wald_bounds(gains, losses, n)
    found = []
    for apart in (0.01, 0.05, 0.1, 0.2, 0.5, 0.8, 1.0):
        for share in np.linspace(0, 1, 11):
            p = [apart * share, apart * (1 - share), 1 - apart]
            counts = np.stack([gains, losses, n - gains - losses], axis=1)
            weight = stats.multinomial.pmf(counts, n, p)
            truth = p[0] - p[1]
            found.append(weight[(low - 1e-9 <= truth) & (truth <= high + 1e-9)].sum())
    assert min(found) >= 0.90
    assert np.mean(found) >= 0.94


def test_samples_of_a_cluster_are_one_unit():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    once = interval([0.5, 1.0, 0.0], kind="share")
    assert interval(values, ["a", "a", "b", "b", "c", "c"], kind="share") == once
    copies = interval(
        np.repeat(values, 40), np.repeat(["a", "a", "b", "b", "c", "c"], 40), kind="share"
    )
    assert (copies.units, copies.low, copies.high) == (3, once.low, once.high)


def test_unequal_clusters_count_once_or_by_their_values():
    values, clusters = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    assert interval(values, clusters, kind="share").value == 0.5
    by_value = interval(values, clusters, kind="share", weigh="values")
    assert by_value.value == 0.75
    # Clusters of 3 and 1 hold as much as (3 + 1)^2 / (9 + 1) = 1.6 independent values at least.
    low, high = mid_p_bounds(0.75 * 1.6, 1.6)
    assert (by_value.low, by_value.high) == (pytest.approx(low), pytest.approx(high))


def test_a_mean_of_symmetric_values_has_the_t_interval_at_least():
    # mean 3, sd sqrt(2.5), t(.975, 4) = 2.776445; the third moment is 0
    found = interval([1, 2, 3, 4, 5])
    assert found.value == 3
    assert found.low == pytest.approx(3 - 2.776445 * math.sqrt(2.5 / 5), abs=1e-5)
    assert found.high == pytest.approx(3 + 2.776445 * math.sqrt(2.5 / 5), abs=1e-5)


def test_the_long_tail_gets_the_wider_side():
    values = np.array([1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 9.0])
    found, mirrored = interval(values), interval(-values)
    assert found.high - found.value > 1.5 * (found.value - found.low)
    assert mirrored.low == pytest.approx(-found.high)
    t = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert found.low <= t[0]
    assert found.high >= t[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([2.5], "1 unit, an interval needs 5"),
        ([0.1, 0.2, 0.3, 0.4], "4 units, an interval needs 5"),
        ([0.37] * 30, "all 30 units have the same value"),
        ([0.0] * 26 + [0.1, 0.2, 0.3, 0.4], "only 4 of 30 units differ from the most common value"),
    ],
)
def test_what_has_no_interval_says_what_it_needs(values: list[float], words: str):
    found = interval(values)
    assert not found.known
    assert words in found.needs
    assert found.as_dict()["low"] is None
    assert words in str(found.as_dict()["needs"])


def test_bounds_are_respected():
    found = interval([0.2, 0.9, 0.95, 1.0, 0.99, 0.97], bounds=(0.0, 1.0))
    assert found.high <= 1.0
    won = interval([1.0] * 9 + [-1.0], bounds=(-1.0, 1.0))
    share = share_interval(9, 10)
    assert (won.low, won.high) == (
        pytest.approx(2 * share.low - 1),
        pytest.approx(2 * share.high - 1),
    )
    with pytest.raises(ValueError, match=r"must lie in \[0.0, 1.0\]"):
        interval([0.5, 1.5], kind="share")


def test_equal_counts_have_no_interval() -> None:
    """10 invalid actions in 10% of the episodes: 10 episodes have none in 35% of the samples."""
    found = interval([0.0] * 10, kind="count", bounds=(0.0, np.inf))
    assert "all 10 units have the same value" in found.needs
    # Binary outcomes have known bounds: the mid-p bound solves (1 - p)^10 / 2 = 0.025.
    assert interval([0.0] * 10, kind="share").high == pytest.approx(1 - 0.05**0.1)


def test_counts_of_0_and_1_are_not_known_to_have_no_larger_value() -> None:
    """Negative binomial counts with a mean of 2 are all 0 or 1 in 13% of the samples of 5."""
    found = interval([0.0, 0.0, 0.0, 1.0, 1.0], kind="count", bounds=(0.0, np.inf))
    assert found.needs.startswith("only 2 of 5 units differ from the most common value")
    rng = np.random.default_rng(0)
    samples = rng.negative_binomial(0.5, 0.2, size=(2000, 5)).astype(float)
    printed = [x for s in samples if (x := interval(s, kind="count", bounds=(0.0, np.inf))).known]
    assert np.mean([x.low <= 2 <= x.high for x in printed]) >= 0.97


def test_counts_with_a_known_largest_value_have_an_exact_interval() -> None:
    """Two of 20 units have the largest count, 4; the others have the smallest, 1."""
    found = interval([1.0] * 18 + [4.0] * 2, kind="count", bounds=(1.0, 4.0))
    share = interval([0.0] * 18 + [1.0] * 2, kind="share")
    assert (found.low, found.high) == pytest.approx((1 + 3 * share.low, 1 + 3 * share.high))
    equal = interval([1.0] * 20, kind="count", bounds=(1.0, 4.0))
    assert (equal.low, equal.high) == pytest.approx((1.0, 1 + 3 * (1 - 0.05 ** (1 / 20))))
    only = interval([1.0] * 3, kind="count", bounds=(1.0, 1.0))
    assert (only.value, only.low, only.high, only.units) == (1.0, 1.0, 1.0, 3)


def test_equal_counts_above_their_smallest_value_have_no_interval() -> None:
    """Replies of 64 tokens with 90%, else of 32 on average: mean 60.8, but 35% are all of 64."""
    assert (
        "all 8 units have the same value"
        in interval([64.0] * 8, kind="count", bounds=(0, np.inf)).needs
    )


def test_two_of_several_ratings_are_not_the_only_ones() -> None:
    """Ratings of 1, 2 and 3 with a mean of 2: few of them often have two values."""
    assert not interval([1.0, 1.0, 2.0, 2.0], kind="mean").known
    rng = np.random.default_rng(0)
    for n in (4, 5, 6, 8):
        samples = rng.integers(1, 4, size=(2000, n)).astype(float)
        found = [x for sample in samples if (x := interval(sample, kind="mean")).known]
        covered = np.mean([x.low <= 2 <= x.high for x in found]) if found else 1.0
        assert covered >= 0.9
    won = interval([1.0] * 12 + [-1.0] * 3, kind="mean")
    share = share_interval(12, 15)
    assert (won.low, won.high) == pytest.approx((2 * share.low - 1, 2 * share.high - 1))


def test_rounding_errors_are_no_spread() -> None:
    values, sizes = [0.1] * 21, [1, 2, 3, 4, 5, 6]
    names = [name for name, size in enumerate(sizes) for _ in range(size)]
    assert "all 6 units have the same value" in interval(values, names).needs
    first = np.linspace(0.3, 5.3, 60)
    assert "all 60 units have the same value" in difference(first, first - 0.1).needs


def test_a_ratio_weighs_its_units_by_their_denominators():
    nats, tokens = [2.0, 9.0, 4.0, 3.0, 8.0, 5.0], [1.0, 3.0, 2.0, 1.0, 4.0, 2.0]
    found = ratio_interval(nats, tokens)
    assert found.value == pytest.approx(31 / 13)
    even = ratio_interval([1.0, 2.0, 3.0, 4.0, 6.0], [2.0] * 5)
    assert even.low == pytest.approx(interval([0.5, 1.0, 1.5, 2.0, 3.0]).low)
    assert found.needs == "6 units of different sizes, an interval needs 50"
    # One text has nine of ten tokens: the ratio is fitted to it.
    values = np.arange(60.0)
    single = ratio_interval(values, np.r_[531.0, np.ones(59)])
    assert single.needs == "the largest of 60 units has 90% of the total weight"


def test_large_clusters_do_not_hide_their_error():
    """The standard error of a ratio is that of the jackknife, with its residuals divided by 1 - h.

    Weights: 1 of 50 texts, 5 of the other 10; their sum is 100. Satterthwaite's degrees of freedom
    are (50 * 1 + 10 * 25)^2 / (50 * 1 + 10 * 625) - 1 = 90000 / 6300 - 1.
    """
    sizes = np.r_[np.ones(50), np.full(10, 5.0)]
    found = ratio_interval(sizes + np.tile([1.0, -1.0], 30), sizes)
    # Ratio 1; residuals +1 and -1 over a mean of 5/3, times (59/60) / (1 - h). Symmetric values
    # have the interval of Student's t.
    squares = 50 * (0.6 * 59 / 60 / 0.99) ** 2 + 10 * (0.6 * 59 / 60 / 0.95) ** 2
    error = math.sqrt(squares / (60 * 59))
    assert found.value == 1
    assert found.high == pytest.approx(1 + stats.t.ppf(0.975, 90000 / 6300 - 1) * error)


def test_prompts_of_equal_rates_do_not_differ_by_their_sizes() -> None:
    """All values of 28 prompts are wrong: their different sizes are no variation."""
    sizes = np.arange(1, 31)
    clusters = np.repeat(np.arange(30), sizes)
    values = np.isin(clusters, (3, 7)) * 1.0  # prompts of 4 and 8 values
    values[clusters == 7] = [1, 0, 0, 0, 0, 0, 0, 0]
    found = interval(values, clusters, kind="share", weigh="values")
    # Sizes 1 to 30 hold as much as (465)^2 / 9455 equal units; 5 of 465 values are right.
    effective = 465**2 / 9455
    low, high = mid_p_bounds(5 / 465 * effective, effective)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    unbounded = interval(
        values * 3 - 1.5 * (values > 0) * (clusters == 3), clusters, weigh="values"
    )
    assert unbounded.needs == (
        "only 2 of 30 units differ from the most common value, with the weight of 1.8 equal "
        "units, an interval needs 5 such units"
    )


def test_differences_of_unequal_prompts_count_as_their_effective_number() -> None:
    # Sizes 3, 1: effective number 16 / 10; all differences are 1, 0.
    found = delta_interval(np.array([1.0, 0.0]), np.array([3.0, 1.0]), kind="share")
    low, high = adjusted_wald_bounds(0.75 * 1.6, 0.0, 1.6)
    assert (found.value, found.low, found.high) == (0.75, pytest.approx(low), pytest.approx(high))
    equal = np.array([0.5, 1.0, -0.25, 0.0, 0.75, 1.0])
    same = delta_interval(equal, np.full(6, 7.0), kind="share")
    alone = delta_interval(equal, kind="share")
    assert (same.low, same.high) == (pytest.approx(alone.low), pytest.approx(alone.high))


def test_a_mean_over_tasks_has_the_moments_of_one():
    rng = np.random.default_rng(0)
    column = rng.normal(size=(8, 1))
    moments = run_and_task_mean_moments(column)
    assert float(moments.mean) == pytest.approx(column.mean())
    assert float(moments.error) == pytest.approx(stats.sem(column[:, 0]))
    assert float(moments.freedom) == pytest.approx(7)
    # Four equal and independent tasks: a quarter of the variance, four times the freedom.
    four = run_and_task_mean_moments(np.tile(column, 4))
    assert float(four.error) == pytest.approx(stats.sem(column[:, 0]) / 2)
    assert float(four.freedom) == pytest.approx(28)


def test_a_stretched_bootstrap_of_a_mean_is_nearly_the_t_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(size=12)
    means = rng.choice(values, size=(100_000, 12)).mean(axis=1)
    found = widened_bootstrap_interval(values.mean(), means, 12, 11)
    low, high = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    assert "4 units" in widened_bootstrap_interval(0.0, means, 4, 3).needs


def test_a_paired_difference_removes_the_common_part():
    common = np.array([0.0, 10, 20, 30, 40, 50])
    found = difference(common + np.array([1, 2, 1.5, 2, 1, 1.5]), common, kind="mean")
    assert found.value == pytest.approx(1.5)
    assert found.high - found.low < 2
    by_prompt = difference([1, 1, 0, 1], [0, 0, 0, 0], ["a", "a", "b", "b"], kind="mean")
    assert (by_prompt.units, by_prompt.value) == (2, 0.75)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_unusable_values_are_refused(bad: list[float]):
    with pytest.raises(ValueError, match=r"non-empty|not finite"):
        interval(bad)


def test_other_misuse_is_refused():
    with pytest.raises(ValueError, match="equal lengths"):
        difference([1, 2], [1])
    with pytest.raises(ValueError, match="one cluster per value"):
        interval([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="successes <= units"):
        share_interval(3, 2)


def test_two_counts_and_few_outcomes_are_not_binary():
    values = [0.0] * 15 + [1.0] * 5
    assert interval(values, kind="count", bounds=(0.0, np.inf)).method.startswith("t,")
    assert interval(values).method == "exact (mid-p)"
    assert interval(values[:12]).needs.startswith("all 12 units have the same value")
    assert interval([0.0] * 5 + [1.0] * 4).needs.startswith("only 4 of 9 units")


def test_a_paired_difference_of_two_values_is_that_of_shares():
    first, second = np.repeat([4.0, 1.0], [9, 3]), np.repeat([4.0, 1.0], [3, 9])
    share = difference(first == 4, second == 4, kind="share")
    found = difference(first, second)
    assert (found.low, found.high) == pytest.approx((3 * share.low, 3 * share.high))
    assert difference(first, second, kind="count").method.startswith("t,")
    assert not difference(np.ones(12), np.ones(12)).known
