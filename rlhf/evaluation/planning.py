"""How many seeds and episodes a comparison needs, and how often its intervals are right."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from rlhf.stats import mean_bounds

_MOST_PAIRS = 10_000_000


@dataclass(frozen=True)
class Plan:
    """The smallest experiment that finds the difference with the wanted power."""

    seeds: int
    """Training seeds (pairs of runs), or pairs of episodes when no seed varies."""
    episodes: int
    """Evaluation episodes behind each seed's mean."""
    power: float
    """Probability that the interval of the paired difference excludes 0; at least as asked."""


def paired_power(effect: float, n: int, *, level: float = 0.95) -> float:
    """Power of the two-sided paired t test: n pairs, `effect` = |difference| / sd of a difference.

    The test statistic has a non-central t distribution.
    """
    if n < 2:
        raise ValueError(f"a paired test needs at least 2 pairs, got {n}")
    critical, shift = special.stdtrit(n - 1, (1 + level) / 2), abs(effect) * math.sqrt(n)
    below = special.nctdtr(n - 1, shift, critical)
    # The far tail is not a number where it is too small to be computed.
    beyond = np.nan_to_num(special.nctdtr(n - 1, shift, -critical))
    return float(1 - below + beyond)


def plan(
    difference: float,
    *,
    seed_sd: float,
    episode_sd: float = 0.0,
    episodes: int = 1,
    power: float = 0.8,
    level: float = 0.95,
) -> Plan:
    """Fewest training seeds that find `difference` with `power` at `episodes` episodes a seed.

    `seed_sd` is the standard deviation between seeds of the paired difference, `episode_sd` that of
    one episode's paired difference. To plan episodes for one pair of models, pass the episodes'
    spread as `seed_sd` and read `seeds` as pairs of episodes. Raises ValueError for differences of
    0 and for plans beyond ten million pairs.
    """
    if not 0 < power < 1:
        raise ValueError(f"power must lie strictly between 0 and 1, got {power}")
    if episodes < 1 or min(seed_sd, episode_sd) < 0 or seed_sd + episode_sd == 0:
        raise ValueError("need episodes >= 1 and standard deviations >= 0, not both 0")
    sd = math.sqrt(seed_sd**2 + episode_sd**2 / episodes)
    effect = abs(difference) / sd

    def reached(n: int) -> bool:
        return paired_power(effect, n, level=level) >= power

    high = 2
    while not reached(high):
        high *= 2
        if high > _MOST_PAIRS:
            raise ValueError(f"no plan: {difference} is too small beside a spread of {sd:.3g}")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return Plan(high, episodes, paired_power(effect, high, level=level))


def redrawn_coverage(
    population: np.ndarray,
    n: int,
    *,
    rng: np.random.Generator,
    trials: int = 2000,
    level: float = 0.95,
) -> float:
    """Measured coverage of the interval of a mean, for n values drawn from `population` [any].

    This is what `compare` prints beside its intervals.
    """
    low, high = mean_bounds(rng.choice(population, size=(trials, n)), level=level)
    truth = population.mean()
    return float(((low <= truth) & (truth <= high)).mean())
