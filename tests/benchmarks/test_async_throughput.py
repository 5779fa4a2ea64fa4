"""The simulation of throughput against staleness, on cases with known results."""

import itertools

import numpy as np
import pytest

from benchmarks.async_throughput import Setting, collection_times, simulate


def test_batches_of_equal_episodes_take_the_number_of_rounds():
    setting = Setting(episodes=10, episode=3.0, spread=0.0, steps=2)
    for workers, rounds in {1: 10, 4: 3, 5: 2, 10: 1, 64: 1}.items():
        assert collection_times(setting, workers) == pytest.approx([3.0 * rounds] * 2)


@pytest.mark.parametrize("collection", [5.0, 20.0, 60.0])
def test_constant_times_give_the_known_period(collection):
    """Without staleness a step is collection and update; with it, the longer of the two."""
    setting = Setting(update=20.0, publish=1.0, steps=50)
    times = [collection] * setting.steps
    one = collection + setting.publish
    periods = {
        limit: 3600 / simulate(setting, times, max_staleness=limit).steps_per_hour
        for limit in (0, 1, 4)
    }
    assert periods[0] == pytest.approx(one + 20.0)
    # The first batch has no update beside it. With staleness 1, the second batch is collected
    # without new weights while the first one is trained on.
    longer = max(one, 20.0)
    assert periods[1] == pytest.approx(longer, rel=0.05)
    assert periods[4] == pytest.approx(longer, rel=0.1)
    assert periods[1] <= periods[0]


def test_staleness_is_zero_without_a_limit_and_never_above_it():
    setting = Setting(episodes=16, steps=30)
    times = collection_times(setting, 8)
    assert simulate(setting, times, max_staleness=0).staleness == 0
    for limit in (1, 2, 5):
        assert 0 < simulate(setting, times, max_staleness=limit).staleness <= limit


def test_a_slow_collection_is_one_update_old_and_the_trainer_waits():
    setting = Setting(update=1.0, publish=0.0, steps=40)
    outcome = simulate(setting, [10.0] * 40, max_staleness=8)
    assert outcome.staleness == pytest.approx(39 / 40)
    # 40 collections of 10 s and one update after the last of them
    assert outcome.steps_per_hour == pytest.approx(3600 * 40 / 401)
    assert outcome.waiting == pytest.approx((10 + 39 * 9) / 401)


@pytest.mark.parametrize("seed", range(3))
def test_more_staleness_is_not_slower(seed):
    setting = Setting(episodes=64, steps=60, seed=seed, publish=0.0)
    times = collection_times(setting, 32)
    assert np.std(times) > 1
    speeds = [simulate(setting, times, max_staleness=n).steps_per_hour for n in range(5)]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(speeds))
