"""How often `compare_means` names a winner: without a true difference, and with a planted one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlhf.evaluation.significance import Unit, compare_means
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


def exact_power(draw: Draw, *, trials: int, seed: int) -> float:
    """Share of trials in which the exact test on the same units gives p <= 5%."""
    rng = np.random.default_rng(seed)
    return float(np.mean([sign_flip_test(np.subtract(*draw(rng))) <= 0.05 for _ in range(trials)]))
