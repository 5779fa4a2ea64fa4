"""Power against published tables, and the coverage that is printed beside intervals."""

import numpy as np
import pytest

from rlhf.stats.power import paired_t_test_power, sample_size, simulated_coverage


@pytest.mark.parametrize(
    ("effect", "n", "power"),
    # G*Power 3.1, two-sided paired t test, alpha .05
    [(0.5, 34, 0.8078), (0.8, 15, 0.8213), (0.8, 20, 0.9239), (0.0, 7, 0.05)],
)
def test_power_equals_published_values(effect: float, n: int, power: float):
    assert paired_t_test_power(effect, n) == pytest.approx(power, abs=5e-4)


def test_power_equals_simulation_at_three_pairs():
    rng = np.random.default_rng(0)
    data = rng.normal(loc=1.5, size=(200_000, 3))
    t = data.mean(axis=1) / data.std(axis=1, ddof=1) * np.sqrt(3)
    assert paired_t_test_power(1.5, 3) == pytest.approx((np.abs(t) > 4.302653).mean(), abs=0.004)


def test_power_equals_simulation_at_two_pairs():
    # One degree of freedom, where the chi density does not vanish at 0; t(.975, 1) = 12.7062
    rng = np.random.default_rng(0)
    data = rng.normal(loc=6.0, size=(400_000, 2))
    t = data.mean(axis=1) / data.std(axis=1, ddof=1) * np.sqrt(2)
    assert paired_t_test_power(6.0, 2) == pytest.approx((np.abs(t) > 12.7062).mean(), abs=0.003)


def test_plan_is_the_smallest_that_suffices():
    chosen = sample_size(0.5, seed_sd=1.0, power=0.8)
    assert chosen.seeds == 34
    assert paired_t_test_power(0.5, 33) < 0.8 <= chosen.power


def test_more_episodes_spare_seeds_down_to_the_seed_spread():
    few = sample_size(0.2, seed_sd=0.2, episode_sd=2.0, episodes=16)
    many = sample_size(0.2, seed_sd=0.2, episode_sd=2.0, episodes=100_000)
    assert few.seeds > 50
    assert many.seeds == sample_size(0.2, seed_sd=0.2).seeds == 10


def test_hopeless_plans_are_refused():
    with pytest.raises(ValueError, match="too small"):
        sample_size(0.0, seed_sd=1.0)
    with pytest.raises(ValueError, match="power"):
        sample_size(1.0, seed_sd=1.0, power=1.0)


def test_printed_coverage_sees_rare_large_values():
    normal = np.random.default_rng(0).normal(size=20_000)
    fast = simulated_coverage(normal, 5, rng=np.random.default_rng(1), trials=5000)
    assert fast == pytest.approx(0.96, abs=0.012)
    lottery = np.r_[np.zeros(99), 100.0]
    assert simulated_coverage(lottery, 20, rng=np.random.default_rng(1)) < 0.4
