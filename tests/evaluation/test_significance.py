"""The verdict of one comparison; how often it errs is simulated in tests/stats."""

from typing import Any

import numpy as np
import pytest

from rlhf.evaluation.significance import Unit, compare_means, fewest_pairs_for_significance

QUIET: dict[str, Any] = {"measure_coverage": False}


def winners(n: int, shift: float, trials: int, unit: Unit = "training seeds") -> list[str | None]:
    rng = np.random.default_rng(n)
    common = rng.normal(size=(trials, n))
    noise = rng.normal(size=(2, trials, n)) / np.sqrt(2)  # sd of a paired difference is 1
    return [
        compare_means(c + a + shift, c + b, method="new", baseline="old", unit=unit, **QUIET).winner
        for c, a, b in zip(common, *noise, strict=True)
    ]


def test_planted_difference_is_found_and_never_reversed():
    found = winners(20, 0.8, 1000)
    assert found.count("new") / 1000 >= 0.85
    assert found.count("old") == 0


def test_many_comparisons_share_one_error_rate():
    rng = np.random.default_rng(0)
    zeros, names = np.zeros(20), {"method": "a", "baseline": "b"}
    wrong = 0
    for _ in range(400):
        values = rng.normal(size=(10, 20))
        wrong += any(
            compare_means(v, zeros, **names, unit="episodes", comparisons=10, **QUIET).winner
            for v in values
        )
    assert wrong / 400 <= 0.08


def verdict(deltas: list[float], unit: Unit = "training seeds", metric: str = "return"):
    zeros = [0.0] * len(deltas)
    return compare_means(deltas, zeros, method="ppo", baseline="sft", unit=unit, metric=metric)


def test_five_seeds_may_be_called_significant():
    result = verdict([1.0, 1.1, 0.9, 1.2, 1.0])
    assert result.winner == "ppo"
    assert "significantly better" in result.verdict


@pytest.mark.parametrize("unit", ["training seeds", "prompts", "start states", "episodes"])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_equal_differences_of_few_pairs_name_nobody(n: int, unit: Unit):
    """All +1: p = 2 / 2^n of the sign test is 0.5, 0.25, 0.125, 0.0625."""
    names: dict[str, Any] = {"method": "a", "baseline": "b", "unit": unit, "metric": "success"}
    result = compare_means([1.0] * n, [0.0] * n, **names)
    assert result.winner is None
    assert result.p_value == pytest.approx(2 / 2**n)
    assert "not enough" in result.verdict
    assert result.estimate.low < 1.0
    six = compare_means([1.0] * 6, [0.0] * 6, **names)
    assert six.winner == "a"


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_nearly_equal_differences_of_few_episodes_name_nobody(n: int):
    values = 1.0 + 0.001 * np.arange(n)
    assert verdict(values.tolist(), unit="episodes").winner is None
    assert "at least 6" in verdict(values.tolist(), unit="prompts").verdict


def test_more_comparisons_need_more_pairs():
    assert [fewest_pairs_for_significance(level) for level in (0.05, 0.05 / 2, 0.05 / 10)] == [
        6,
        7,
        9,
    ]
    found = compare_means(
        [1.0] * 8, [0.0] * 8, method="a", baseline="b", unit="prompts", comparisons=10
    )
    assert found.winner is None
    assert "at least 9" in found.verdict


@pytest.mark.parametrize("deltas", [[1.0, 1.1, 0.9, 1.05], [2.0, 2.1]])
def test_fewer_seeds_never_are(deltas: list[float]):
    result = verdict(deltas)
    assert result.winner is None
    assert "significant" not in result.verdict
    assert "not enough" in result.verdict


def test_episodes_speak_of_two_models_only():
    result = verdict([1.0, 1.1, 0.9, 1.2, 1.0, 0.8], unit="episodes")
    assert result.winner == "ppo"
    assert "one policy of each method" in result.verdict
    assert "significant" not in result.verdict


def test_noise_names_nobody_and_says_how_many_seeds_it_would_take():
    # mean .5, sd 1: G*Power says 34 pairs for power .8
    deltas = np.array([-1.0, 1, -1, 1, -1, 1, -1, 1]) * np.sqrt(7 / 8) + 0.5
    result = verdict(deltas.tolist())
    assert result.winner is None
    assert "not significant" in result.verdict
    assert "34 training seeds" in result.verdict


def test_the_suggested_number_of_pairs_is_for_the_corrected_level():
    """Power of the t test at level 0.0125 from the noncentral t distribution: 48 pairs, 0.8025."""
    deltas = np.array([-1.0, 1, -1, 1, -1, 1, -1, 1]) * np.sqrt(7 / 8) + 0.5
    keys = {"method": "a", "baseline": "b", "unit": "training seeds", "comparisons": 4}
    assert "48 training seeds" in compare_means(deltas, np.zeros(8), **keys).verdict


@pytest.mark.parametrize("mean", [1e-9, 0.027])
def test_very_large_numbers_of_pairs_are_not_suggested(mean: float):
    """A mean of 0.027 standard deviations needs (1.96 + 0.84)^2 / 0.027^2 = 10,767 pairs."""
    deltas = np.array([-1.0, 1, -1, 1, -1, 1, -1, 1]) * np.sqrt(7 / 8) + mean
    assert "needs about" not in verdict(deltas.tolist()).verdict


def test_lower_cost_wins():
    assert verdict([1.0, 1.1, 0.9, 1.2, 1.0], metric="cost").winner == "sft"


def test_identical_and_single_pairs():
    assert "equal values" in verdict([0.0] * 5).verdict
    single = verdict([1.0])
    assert single.winner is None
    assert "one training seed is not enough" in single.verdict


def test_coverage_is_measured_for_normal_and_for_observed_values():
    rng = np.random.default_rng(0)
    result = verdict(rng.normal(size=40).tolist(), unit="episodes")
    assert result.coverage_normal == pytest.approx(0.95, abs=0.02)
    assert result.coverage_observed == pytest.approx(0.94, abs=0.03)
    assert verdict([1.0, 2, 3, 4, 5]).coverage_observed is None
    lottery = verdict([0.0] * 54 + [50.0] * 3 + [60.0, 70.0, 300.0], unit="episodes")
    assert lottery.coverage_observed is not None
    assert lottery.coverage_observed < 0.99
    rare = verdict([0.0] * 60 + [50.0], unit="episodes").estimate
    assert rare.needs == (
        "only 1 of 61 units differ from the most common value, an interval needs 5 such units"
    )


def test_samples_in_another_order_are_identical() -> None:
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ by 1e-16, with one sign for all six prompts."""
    first, second = (0.1 + 0.2 + 0.3) / 3, (0.3 + 0.2 + 0.1) / 3
    assert first > second
    result = compare_means([first] * 6, [second] * 6, method="a", baseline="b", unit="prompts")
    assert (result.winner, result.p_value) == (None, 1.0)
    assert result.verdict == "a and b have equal values in every pair"


def test_outcomes_that_are_not_whole_numbers_have_the_interval_of_a_share():
    """A normalized return of 0 or 1 is a rescaled return, and so is its interval."""
    first, second = [1.0] * 14 + [0.0] * 10, [1.0] * 4 + [0.0] * 20
    names = {"method": "a", "baseline": "b", "unit": "episodes"}
    plain = compare_means(first, second, **names).estimate
    low, span = -3 / 7, 10 / 7  # of the outcomes 0 and 1, with a random policy at 0.3
    rescaled = [[low + span * value for value in column] for column in (first, second)]
    found = compare_means(*rescaled, metric="normalized", span=span, **names).estimate
    assert found.method == plain.method == "adjusted Wald"
    for name in ("value", "low", "high"):
        assert getattr(found, name) == pytest.approx(span * getattr(plain, name))
    constant = compare_means([0.6] * 30, [0.5] * 30, **names).estimate
    assert constant.low <= constant.value <= constant.high
