"""The exact test of paired differences against every assignment of signs, counted one by one."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from rlhf.stats import sign_flip_test
from rlhf.stats.paired import MAX_ENUMERATED


def counted(differences: list[float]) -> float:
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * size for sign, size in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    return float(np.mean([total >= observed - 1e-9 for total in sums]))


@pytest.mark.parametrize("seed", range(12))
def test_p_is_the_share_of_signs_as_extreme(seed: int):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    values = rng.normal(size=n) + 0.5 if seed % 2 else rng.integers(-2, 4, size=n) / 4
    assert sign_flip_test(values) == pytest.approx(counted(values.tolist()))


def test_equal_differences_have_the_p_of_a_sign_test():
    for n in (1, 2, 3, 4, 5, 6, 10, 40, 400):
        assert sign_flip_test([0.25] * n) == pytest.approx(2 / 2.0**n)
        assert sign_flip_test([0.25] * n + [0.0] * 7) == pytest.approx(2 / 2.0**n)
    # McNemar's exact test: 9 gains and 2 losses.
    exact = stats.binomtest(9, 11, 0.5).pvalue
    assert sign_flip_test([1.0] * 9 + [-1.0] * 2 + [0.0] * 30) == pytest.approx(exact)


def test_no_difference_is_no_evidence():
    assert sign_flip_test([0.0] * 8) == 1.0
    assert sign_flip_test([1.0, -1.0]) == 1.0


@pytest.mark.parametrize("seed", range(6))
def test_many_differences_agree_with_redrawn_signs(seed: int):
    rng = np.random.default_rng(seed)
    n = MAX_ENUMERATED + 1 + int(rng.integers(0, 60))
    values = rng.exponential(size=n) * rng.choice([-1, 1], size=n) + 0.25
    signs = rng.choice([-1.0, 1.0], size=(100_000, n))
    redrawn = (np.abs(signs @ np.abs(values)) >= abs(values.sum()) - 1e-9).mean()
    assert sign_flip_test(values) == pytest.approx(redrawn, abs=0.006)


def test_enumeration_and_expansion_meet():
    rng = np.random.default_rng(3)
    for _ in range(10):
        values = rng.normal(size=MAX_ENUMERATED) + 0.3
        exact = sign_flip_test(values)
        longer = sign_flip_test([*values, 1e-6])
        assert longer == pytest.approx(exact, abs=0.002)


def test_a_few_large_differences_among_many_small_ones_are_not_significant() -> None:
    # Four equal large differences decide the sum: 2 of the 16 assignments of their signs reach it,
    # each with half of the assignments of the small ones, whose sum is 0: p = 2 / 16 / 2.
    small = np.linspace(1e-3, 2e-3, 14)
    p_value = sign_flip_test([1.0] * 4 + [*small, *-small])
    assert p_value == pytest.approx(1 / 16, abs=0.002)


def test_tied_differences_by_hand() -> None:
    # 31 differences of 1/2 and one of 1: the largest sum has one assignment of signs in 2^32, the
    # next one, with a single negative 1/2, has 31. Either sum occurs with both signs.
    assert sign_flip_test([0.5] * 31 + [1.0]) == pytest.approx(2 / 2**32)
    assert sign_flip_test([0.5] * 30 + [-0.5, 1.0]) == pytest.approx(2 * (1 + 31) / 2**32)


def counted_in_whole_numbers(steps: list[int]) -> float:
    """The share of assignments as extreme, from the number of assignments of every sum."""
    sums = Counter({0: 1})
    for step in steps:
        longer: Counter[int] = Counter()
        for total, number in sums.items():
            longer[total + step] += number
            longer[total - step] += number
        sums = longer
    observed = abs(sum(steps))
    reached = sum(number for total, number in sums.items() if abs(total) >= observed)
    return float(Fraction(reached, 2 ** len(steps)))


@pytest.mark.parametrize(("n", "most", "unit"), [(32, 2, 2), (32, 2, 3), (60, 5, 7), (100, 64, 64)])
def test_tied_differences_are_exact(n: int, most: int, unit: int) -> None:
    """Shares of `unit` samples: the approximation is off by up to 0.04 with 32 differences."""
    rng = np.random.default_rng(n)
    for shift in (0, most / 4):
        steps = np.rint(rng.integers(-most, most + 1, size=n) + shift).astype(int)
        expected = counted_in_whole_numbers(steps.tolist())
        assert sign_flip_test(steps / unit) == pytest.approx(expected, rel=1e-9)


def test_differences_of_prompts_with_unequal_numbers_of_samples_are_exact() -> None:
    # Multiples of 1/2, 1/3 and 1/5 are multiples of 1/30.
    values = [1 / 2, -1 / 2, 1 / 3, 2 / 3, -2 / 5, 3 / 5, 4 / 5] * 6
    steps = [15, -15, 10, 20, -12, 18, 24] * 6
    assert sign_flip_test(values) == pytest.approx(counted_in_whole_numbers(steps), rel=1e-9)
