"""False winners without a difference, and the power to find a planted one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rlhf.evaluation.compare import compare_runs
from rlhf.evaluation.metrics import messages_digest
from rlhf.evaluation.records import Evaluation, RunRecord
from tests.stats.verdicts import (
    SEED_FAMILIES,
    Draw,
    against_reference,
    exact_power,
    prompts,
    seeds,
    winners,
)

SEEDS = ("normal", "exponential", "success of 64", "collapse")
TRIALS = 4000


def false_winners(draw: Draw, unit, trials: int, span: float | None) -> float:
    found = winners(draw, unit, trials=trials, seed=0, span=span)
    return 1 - found.count("") / trials


@pytest.mark.parametrize(
    ("count", "samples", "decoding"),
    [(5, 16, "sampled"), (10, 1, "greedy"), (20, 4, "sampled"), (100, 64, "sampled")],
)
def test_equal_policies_have_no_winner(count: int, samples: int, decoding: str):
    draw = prompts(count, samples, decoding=decoding)
    assert false_winners(draw, "prompts", 1500, 1.0) <= 0.06


@pytest.mark.parametrize(("count", "family"), [(2, "normal"), (5, "normal"), (7, "collapse")])
def test_equal_methods_have_no_winner(count: int, family: str):
    assert false_winners(seeds(count, family), "training seeds", 2000, None) <= 0.06


@pytest.mark.sweep
@pytest.mark.parametrize("count", [5, 10, 20, 100])
def test_equal_policies_have_no_winner_at_any_size(count: int):
    for samples in (1, 2, 4, 16, 64):
        for decoding in ("greedy", "sampled"):
            for alike in (0.05, 0.3, 0.8):
                draw = prompts(count, samples, decoding=decoding, alike=alike)
                share = false_winners(draw, "prompts", TRIALS, 1.0)
                print(f"{count} prompts, {samples} {decoding}, {alike}: {share:.3f}")
                assert share <= 0.06


@pytest.mark.sweep
@pytest.mark.parametrize("family", SEEDS)
def test_equal_methods_have_no_winner_at_any_number_of_seeds(family: str):
    for count in range(2, 21):
        share = false_winners(seeds(count, family), "training seeds", TRIALS, None)
        print(f"{count} seeds, {family}: {share:.3f}")
        assert share <= 0.06


def false_winners_against_a_reference(trials: int, *args, **kwargs) -> float:
    make, rng = against_reference(*args, **kwargs), np.random.default_rng(0)
    return float(np.mean([make(rng).winner is not None for _ in range(trials)]))


@pytest.mark.parametrize(("count", "family"), [(5, "exponential"), (9, "collapse")])
def test_seeds_as_good_as_a_reference_do_not_win(count: int, family: str):
    share = false_winners_against_a_reference(1500, count, family, "normal", units=30, ratio=0.3)
    assert share <= 0.06


@pytest.mark.sweep
@pytest.mark.parametrize("family", SEED_FAMILIES)
def test_seeds_as_good_as_a_reference_do_not_win_at_any_number_of_seeds(family: str):
    for count in (2, 5, 8, 9, 10, 12, 15, 20):
        for reference in ("normal", "exponential"):
            for units, ratio in ((10, 0.3), (10, 3.0), (30, 0.3), (30, 3.0)):
                share = false_winners_against_a_reference(
                    TRIALS, count, family, reference, units=units, ratio=ratio
                )
                print(f"{count} {family} seeds, {units} {reference}, {ratio}: {share:.3f}")
                assert share <= 0.06


def gain_found_in(make: Callable[[float], Draw], trials: int = 400) -> float | None:
    """The smallest gain that the exact test finds in 80% of trials."""
    for gain in np.linspace(0.05, 1.0, 20):
        if exact_power(make(float(gain)), trials=trials, seed=1) >= 0.8:
            return float(gain)
    return None


def power(make: Callable[[float], Draw], unit, span: float | None, trials: int) -> float | None:
    gain = gain_found_in(make)
    if gain is None:
        return None
    return winners(make(gain), unit, trials=trials, seed=2, span=span).count("new") / trials


@pytest.mark.parametrize(("count", "samples"), [(10, 16), (100, 4)])
def test_what_the_exact_test_finds_is_found(count: int, samples: int):
    found = power(lambda gain: prompts(count, samples, gain=gain), "prompts", 1.0, 400)
    assert found is not None
    assert found >= 0.75


@pytest.mark.sweep
@pytest.mark.parametrize("count", [10, 20, 100])
def test_what_the_exact_test_finds_is_found_at_any_size(count: int):
    for samples in (1, 4, 64):
        for decoding in ("greedy", "sampled"):

            def make(gain: float, samples: int = samples, decoding: str = decoding) -> Draw:
                return prompts(count, samples, decoding=decoding, gain=gain)

            found = power(make, "prompts", 1.0, 1000)
            print(f"{count} prompts, {samples} {decoding}: {found}")
            assert found is None or found >= 0.75


@pytest.mark.sweep
@pytest.mark.parametrize("count", [5, 6, 8, 10, 20])
def test_a_planted_method_is_found(count: int):
    def make(gain: float) -> Draw:
        return seeds(count, "normal", 6 * gain)

    found = power(make, "training seeds", None, 1000)
    print(f"{count} seeds: {found}")
    assert found is None or found >= 0.75


def run(name: str, right: np.ndarray, samples: int) -> RunRecord:
    """A run whose greedy episodes repeat the prompts, as an evaluation writes them."""
    episodes = [
        {
            "env": "prompts",
            "policy": name,
            "decoding": "greedy",
            "seed": 2**30 + copy * right.size + index,
            "sample": 0,
            "prompt_index": index,
            "prompt_id": messages_digest([{"content": f"prompt {index}"}]),
            "return": 0.0,
            "components": {"exact_match": float(value)},
        }
        for copy in range(samples)
        for index, value in enumerate(right)
    ]
    directory = Path("/nowhere") / name
    return RunRecord(directory, name, evaluations=[Evaluation(name, {}, episodes)])


def test_repeated_prompts_name_no_winner_out_of_noise():
    """From episodes to verdict: 10 prompts in 250 greedy episodes are 10 observations."""
    rng, named = np.random.default_rng(0), 0
    for _ in range(150):
        sides = (rng.random((2, 10)) < 0.5).astype(float)
        runs = [run(name, right, 25) for name, right in zip(("a", "b"), sides, strict=True)]
        result = compare_runs(runs)
        assert result.metric == "exact_match"
        assert {(row.estimate.units, row.unit) for row in result.rows} == {(10, "prompts")}
        (found,) = result.differences
        assert found.estimate.units == 10
        named += found.winner is not None
    assert named <= 0.1 * 150
