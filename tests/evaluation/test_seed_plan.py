"""The numbers of seeds: against formulas, against independent simulation, and their mistakes."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from rlhf.cli.main import main
from rlhf.evaluation.records import read_run
from rlhf.evaluation.seed_plan import estimate_deviations, plan_seeds
from rlhf.evaluation.significance import compare_means, first_method_wins
from rlhf.stats.power import paired_t_test_power, sample_size, upper_standard_deviation
from tests.helpers.runs import write_run


def call(capsys, *words):
    code = main(["plan-seeds", *map(str, words)])
    return code, capsys.readouterr()


@pytest.mark.parametrize(("degrees", "factor"), [(1, 3.947), (4, 1.558), (9, 1.293)])
def test_the_limit_of_a_standard_deviation_is_that_of_the_chi_square_distribution(degrees, factor):
    assert upper_standard_deviation(2.0, degrees) == pytest.approx(2 * factor, rel=1e-3)
    expected = math.sqrt(degrees / stats.chi2.ppf(0.2, degrees))
    assert upper_standard_deviation(1.0, degrees) == pytest.approx(expected)


def test_a_study_planned_with_the_limit_is_large_enough_in_80_percent_of_all_cases():
    """400 pilots of 5 seeds; with the estimate, about half of the studies are too small."""
    rng = np.random.default_rng(0)
    enough = {"estimate": 0, "limit": 0}
    for pilot in rng.normal(size=(400, 5)):
        sd = float(pilot.std(ddof=1))
        for name, planned in (("estimate", sd), ("limit", upper_standard_deviation(sd, 4))):
            seeds = sample_size(0.5, seed_sd=planned).seeds
            enough[name] += paired_t_test_power(0.5, seeds) >= 0.8
    assert enough["limit"] / 400 == pytest.approx(0.8, abs=0.06)
    assert enough["estimate"] / 400 < 0.6


@pytest.mark.parametrize("comparisons", [1, 3])
@pytest.mark.parametrize("count", [3, 5, 6, 9, 30])
def test_the_fast_verdict_is_that_of_compare_means(comparisons, count):
    rng = np.random.default_rng(count)
    for _ in range(60):
        deltas = rng.normal(0.8, 1.0, size=count)
        verdict = compare_means(
            deltas,
            np.zeros(count),
            method="new",
            baseline="old",
            unit="training seeds",
            comparisons=comparisons,
            measure_coverage=False,
        )
        found = first_method_wins(deltas, comparisons=comparisons)
        assert found == (verdict.winner == "new")


def test_the_plan_is_the_smallest_that_an_independent_simulation_confirms():
    size = plan_seeds(0.1, seed_sd=0.05, episode_sd=0.4, episodes=64)
    assert size.seeds is not None
    assert size.power is not None
    sd = math.sqrt(0.05**2 + 0.4**2 / 64)
    rng = np.random.default_rng(7)

    def power(seeds: int) -> float:
        drawn = rng.normal(0.1, sd, size=(2000, seeds))
        return float(np.mean([first_method_wins(row) for row in drawn]))

    assert power(size.seeds) > 0.76
    assert power(size.seeds - 1) < 0.84
    assert size.power.low <= power(size.seeds) + 0.03
    assert size.seeds >= sample_size(0.1, seed_sd=sd).seeds
    few = plan_seeds(10.0, seed_sd=0.05, episode_sd=0.4, episodes=64)
    assert few.seeds == 5  # no verdict with fewer seeds


def write_pilot(tmp_path, methods, *, seeds, seed_sd, episode_sd, episodes, rng):
    """Runs with planted deviations; the noise of an episode is the same for no two methods."""
    found = []
    for seed in range(seeds):
        for name in methods:
            level = rng.normal(0, seed_sd)
            values = {i: level + rng.normal(0, episode_sd) for i in range(episodes)}
            found.append(write_run(tmp_path / f"seed{seed}" / name, values))
    return found


def test_the_deviations_of_a_pilot_are_the_planted_ones(tmp_path):
    rng = np.random.default_rng(0)
    planted = {"seed_sd": 0.5, "episode_sd": 2.0, "episodes": 40}
    folders = write_pilot(tmp_path, ["new", "old"], seeds=60, rng=rng, **planted)
    spread = estimate_deviations([read_run(folder) for folder in folders], "return")
    # The difference of two methods has twice the variance of one.
    assert spread.seed_sd == pytest.approx(math.sqrt(2) * 0.5, rel=0.15)
    assert spread.episode_sd == pytest.approx(math.sqrt(2) * 2.0, rel=0.05)
    assert spread.seed_sd_limit is not None
    assert spread.seed_sd < spread.seed_sd_limit < 1.2 * spread.seed_sd
    single = [read_run(folder) for folder in folders if folder.name == "new"]
    alone = estimate_deviations(single, "return")
    assert alone.seed_sd == pytest.approx(spread.seed_sd, rel=0.25)
    assert alone.episode_sd == pytest.approx(spread.episode_sd, rel=0.05)
    assert "assumed to be equally variable" in alone.notes[1]


def test_the_command_says_what_is_known(tmp_path, capsys):
    options = ["--difference", "0.2", "--seed_sd", "0.1", "--episode_sd", "0.5"]
    code, told = call(capsys, *options, "--episodes", "[50, 200]")
    assert code == 0, told.err
    assert "| 50 |" in told.out
    assert "if some runs fail completely, more seeds are needed" in told.out
    code, told = call(capsys, *options, "--episodes", "[50]", "--json")
    [plan] = json.loads(told.out)["plans"]
    assert plan["estimate"]["power"]["mean"] >= 0.8
    folders = write_pilot(
        tmp_path,
        ["new", "old"],
        seeds=5,
        seed_sd=0.1,
        episode_sd=0.5,
        episodes=40,
        rng=np.random.default_rng(1),
    )
    code, told = call(capsys, *folders, "--difference", "0.5", "--episodes", "[40]")
    assert code == 0, told.err
    assert "seeds (upper limit)" in told.out
    assert "upper 80% confidence limit" in told.out
    code, told = call(capsys, *folders[:2], "--difference", "0.5")
    assert code == 2
    assert (
        "there is only one common training seed, so the variance between seeds is unknown"
        in told.err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--difference", "0.1"], "give --seed_sd and --episode_sd, or evaluated runs"),
        (["--difference", "0.1", "--seed_sd", "1"], "give --seed_sd and --episode_sd"),
        (["--difference", "0", "--seed_sd", "1", "--episode_sd", "1"], "difference"),
        (["--difference", "1", "--seed_sd", "0", "--episode_sd", "0"], "both 0"),
        (
            ["--difference", "1", "--seed_sd", "1", "--episode_sd", "1", "--metric", "x"],
            "no effect",
        ),
        (["runs/none", "--difference", "1"], "does not exist"),
        (["runs/none", "--difference", "1", "--seed_sd", "1"], "but not both"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    code, told = call(capsys, *words)
    assert code == 2
    assert told.err.count("\n") == 1
    assert message in told.err


def test_a_hopeless_plan_says_so(capsys):
    options = ["--difference", "0.001", "--seed_sd", "1", "--episode_sd", "1", "--episodes", "[64]"]
    code, told = call(capsys, *options)
    assert (code, "more than 1000" in told.out) == (0, True)


def test_extreme_numbers_have_a_plan(capsys):
    """A tail of the first t test and the square of the second deviation are out of range."""
    for difference, seed_sd, hopeless in (("1e10", "1", False), ("1e-9", "1e300", True)):
        words = ["--difference", difference, "--seed_sd", seed_sd, "--episode_sd", "0"]
        code, told = call(capsys, *words, "--episodes", "[64]")
        assert (code, "more than" in told.out) == (0, hopeless), told


def test_the_required_power_is_not_rounded(capsys):
    words = ["--difference", "1", "--seed_sd", "0.1", "--episode_sd", "0", "--power", "0.9995"]
    assert "with a power of 99.95%" in call(capsys, *words)[1].out
