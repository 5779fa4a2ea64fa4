"""How often `compare_means` names a winner: without a true difference, and with a planted one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlhf.evaluation.significance import Difference, Unit, compare_means
from rlhf.stats import sign_flip_test

Rng = np.random.Generator
Draw = Callable[[Rng], tuple[np.ndarray, np.ndarray]]
"""Values of both sides, one for each unit."""


def prompts(
    count: int, samples: int, *, decoding: str = "sampled", gain: float = 0.0, alike: float = 0.3
) -> Draw:
    """Success rates of two policies on the same prompts; greedy samples of a prompt are copies.

    The rates of both are equal but for `gain`: sampled ones belong to the prompt, greedy ones are
    right or wrong by chance of the policy.
    """
    strength = 1 / alike - 1

    def draw(rng: Rng) -> tuple[np.ndarray, np.ndarray]:
        rate = rng.beta(0.4 * strength, 0.6 * strength, size=count)
        better = np.clip(rate + gain, 0, 1)
        if decoding == "greedy":
            return (rng.random(count) < better) * 1.0, (rng.random(count) < rate) * 1.0
        return rng.binomial(samples, better) / samples, rng.binomial(samples, rate) / samples

    return draw


def seeds(count: int, family: str, gain: float = 0.0) -> Draw:
    """Means of two methods by training seed, with a part common to the seed."""

    def draw(rng: Rng) -> tuple[np.ndarray, np.ndarray]:
        common = rng.normal(size=count)
        noise = {
            "normal": lambda: rng.normal(size=(2, count)),
            "exponential": lambda: rng.exponential(size=(2, count)),
            "success of 64": lambda: rng.binomial(64, 0.7, size=(2, count)) / 64,
            "collapse": lambda: (rng.random((2, count)) < 0.7) + 0.01 * rng.normal(size=(2, count)),
        }[family]()
        return common + noise[0] + gain, common + noise[1]

    return draw


def winners(draw: Draw, unit: Unit, *, trials: int, seed: int, span: float | None) -> list[str]:
    """The winner of each trial, "" where there is none."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(trials):
        left, right = draw(rng)
        verdict = compare_means(
            left,
            right,
            method="new",
            baseline="old",
            unit=unit,
            span=span,
            measure_coverage=False,
        )
        found.append(verdict.winner or "")
    return found


SEED_FAMILIES: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1.0,
    "collapse": lambda rng, n: (
        ((rng.random(n) < 0.7) - 0.7) / 0.21**0.5 + 0.02 * rng.normal(size=n)
    ),
}
"""Family of the values of training seeds -> n values with a mean of 0 and a deviation of 1."""


def against_reference(
    count: int, family: str, reference: str, *, units: int, ratio: float, comparisons: int = 1
) -> Callable[[Rng], Difference]:
    """Seeds of a method and one evaluation of a reference policy with the same true mean of 0.

    `ratio` is the error of the mean of the reference, divided by that of the mean of the seeds.
    """

    def make(rng: Rng) -> Difference:
        returns = SEED_FAMILIES[reference](rng, units)
        seeds = SEED_FAMILIES[family](rng, count) * np.sqrt(count / units) / ratio
        return _against_reference(seeds, returns, None, comparisons)

    return make


def success_against_reference(
    count: int, rates: tuple[float, float], collapse: float, *, units: int
) -> Callable[[Rng], Difference]:
    """Success of seeds and of a reference policy on the same start states.

    `rates` are the success rates of the method and of the reference; a seed fails in all start
    states with the probability `collapse`.
    """

    def make(rng: Rng) -> Difference:
        works = rng.random((count, 1)) >= collapse
        success = works * (rng.random((count, units)) < rates[0])
        reference = (rng.random(units) < rates[1]) * 1.0
        return _against_reference(success.mean(axis=1), reference, 1.0, 1, success.mean(axis=0))

    return make


def _against_reference(
    seeds: np.ndarray,
    reference: np.ndarray,
    span: float | None,
    comparisons: int,
    by_unit: np.ndarray | None = None,
) -> Difference:
    return compare_means(
        seeds,
        np.full(seeds.size, reference.mean()),
        method="new",
        baseline="random",
        unit="training seeds",
        span=span,
        comparisons=comparisons,
        shared_differences=(seeds.mean() if by_unit is None else by_unit) - reference,
        measure_coverage=False,
    )


def exact_power(draw: Draw, *, trials: int, seed: int) -> float:
    """Share of trials in which the exact test on the same units gives p <= 5%."""
    rng = np.random.default_rng(seed)
    return float(np.mean([sign_flip_test(np.subtract(*draw(rng))) <= 0.05 for _ in range(trials)]))
