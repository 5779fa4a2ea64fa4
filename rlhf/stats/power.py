"""Plan sample sizes: power of a paired comparison, and simulated coverage of an interval."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from rlhf.stats.means import mean_moments, skew_corrected_t_bounds

_MAX_PAIRS = 10_000_000


@dataclass(frozen=True)
class SampleSize:
    """Size of the smallest experiment that detects a difference with the required power."""

    seeds: int
    """Number of training seeds, which equals the number of pairs of runs. In a comparison of two
    trained models, this is the number of pairs of episodes."""
    episodes: int
    """Number of evaluation episodes for each training seed."""
    power: float
    """Probability that, with this size, the interval of the paired difference excludes 0."""


def paired_t_test_power(effect: float, n: int, *, level: float = 0.95) -> float:
    """Return the power of the two-sided paired t test, from the non-central t distribution.

    Args:
        effect: Mean difference, divided by the standard deviation of one paired difference.
        n: Number of pairs, at least 2.
        level: One minus the significance level.

    Raises:
        ValueError: `n` is less than 2.
    """
    if n < 2:
        raise ValueError(f"a paired test needs at least 2 pairs, got {n}")
    critical, shift = special.stdtrit(n - 1, (1 + level) / 2), abs(effect) * math.sqrt(n)
    # nctdtr returns nan if the tail underflows.
    below, lower = np.nan_to_num(special.nctdtr(n - 1, shift, [critical, -critical]))
    return float(1 - below + lower)


def sample_size(
    difference: float,
    *,
    seed_sd: float,
    episode_sd: float = 0.0,
    episodes: int = 1,
    power: float = 0.8,
    level: float = 0.95,
) -> SampleSize:
    """Return the smallest number of training seeds that detects `difference` with `power`.

    To plan the number of episodes for the comparison of two trained models, pass the standard
    deviation over episodes as `seed_sd`. In this case, `seeds` of the result is the number of pairs
    of episodes.

    Args:
        difference: Mean difference to detect.
        seed_sd: Standard deviation of the paired difference over training seeds.
        episode_sd: Standard deviation of the paired difference over the episodes of one seed.
        episodes: Number of evaluation episodes for each training seed.
        power: Required probability of detection.
        level: One minus the significance level.

    Raises:
        ValueError: An argument is out of range, or more than ten million pairs would be needed.
    """
    if not 0 < power < 1:
        raise ValueError(f"power must lie strictly between 0 and 1, got {power}")
    if episodes < 1 or min(seed_sd, episode_sd) < 0 or seed_sd + episode_sd == 0:
        raise ValueError("episodes must be >= 1, and the standard deviations >= 0 and not both 0")
    sd = math.hypot(seed_sd, episode_sd / math.sqrt(episodes))
    effect = abs(difference) / sd

    def is_enough(n: int) -> bool:
        return paired_t_test_power(effect, n, level=level) >= power

    candidates = range(2, _MAX_PAIRS + 1)
    index = bisect_left(candidates, True, key=is_enough)
    if index == len(candidates):
        raise ValueError(
            f"a difference of {difference} is too small to detect with {_MAX_PAIRS:,} pairs: the "
            f"standard deviation is {sd:.3g}"
        )
    seeds = candidates[index]
    return SampleSize(seeds, episodes, paired_t_test_power(effect, seeds, level=level))


def upper_standard_deviation(
    sd: float, degrees_of_freedom: int, *, confidence: float = 0.8
) -> float:
    """Return the upper confidence limit of a standard deviation of normally distributed values.

    If a study is planned with the standard deviation of a small pilot study, it is too small in
    about half of all cases. If it is planned with the 80% limit, it is large enough in 80% of all
    cases (Browne 1995, On the use of a pilot sample for sample size determination).

    >>> round(upper_standard_deviation(1.0, 4), 3)
    1.558

    Args:
        sd: Estimated standard deviation.
        degrees_of_freedom: Degrees of freedom of the estimate, at least 1.
        confidence: Probability that the limit is at least the true standard deviation.

    Raises:
        ValueError: `degrees_of_freedom` is less than 1.
    """
    if degrees_of_freedom < 1:
        raise ValueError(
            f"a standard deviation needs at least 1 degree of freedom, got {degrees_of_freedom}"
        )
    return sd * math.sqrt(
        degrees_of_freedom / float(special.chdtri(degrees_of_freedom, confidence))
    )


def simulated_coverage(
    population: np.ndarray, n: int, *, rng: np.random.Generator, trials: int = 2000
) -> float:
    """Return the simulated coverage of the 95% interval of a mean of n draws from `population`.

    The coverage is the proportion of `trials` samples whose interval contains the mean of the
    population.
    """
    low, high = skew_corrected_t_bounds(mean_moments(rng.choice(population, size=(trials, n))))
    truth = population.mean()
    return float(((low <= truth) & (truth <= high)).mean())
