"""Plan the number of training seeds and evaluation episodes of a comparison of two methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.errors import UserError
from rlhf.evaluation.records import RunRecord
from rlhf.evaluation.run_groups import MethodValues, collect_metric_values, unit_means
from rlhf.evaluation.significance import FEWEST_SEEDS, first_method_wins
from rlhf.stats import Interval, interval
from rlhf.stats.power import sample_size, upper_standard_deviation

EXPERIMENTS = 1000
"""Number of simulated experiments from which a power is computed."""
MAX_SEEDS = 1000
"""Maximum number of training seeds of a plan."""


@dataclass(frozen=True)
class DifferenceDeviations:
    """Standard deviations of the paired difference between two methods."""

    seed_sd: float
    """Standard deviation over training seeds, without the error of the evaluation."""
    episode_sd: float
    """Standard deviation over the evaluation units (episodes or prompts) of one training seed."""
    seed_sd_limit: float | None = None
    """Upper 80% confidence limit of ``seed_sd``; None if ``seed_sd`` is not an estimate."""
    notes: tuple[str, ...] = ()
    """How the standard deviations were estimated."""


@dataclass(frozen=True)
class SeedPlan:
    """Number of training seeds for one number of episodes."""

    episodes: int
    """Number of evaluation episodes of each trained model."""
    seeds: int | None
    """Number of training seeds of each method; None if `MAX_SEEDS` are not enough."""
    power: Interval | None
    """Simulated power of the verdict of `rlhf compare` with this number of seeds; None if `seeds`
    is None."""


def plan_seeds(
    difference: float,
    *,
    seed_sd: float,
    episode_sd: float,
    episodes: int,
    power: float = 0.8,
    comparisons: int = 1,
) -> SeedPlan:
    """Return the smallest number of training seeds that detects a difference with `power`.

    The search starts at the number of seeds that the paired t test needs, or at `FEWEST_SEEDS` if
    this is larger. For each number, the verdict of `rlhf compare` is simulated for normally
    distributed differences. The verdict needs more seeds than the t test if there are few.

    Args:
        difference: True mean difference between two methods, positive.
        seed_sd: Standard deviation of the difference over training seeds.
        episode_sd: Standard deviation of the difference over the episodes of one training seed.
        episodes: Number of evaluation episodes of each trained model.
        power: Required probability that the better method is declared the winner.
        comparisons: Number of comparisons, for the Bonferroni correction.

    Raises:
        UserError: Both standard deviations are 0.
    """
    sd = math.hypot(seed_sd, episode_sd / math.sqrt(episodes))
    if sd == 0:
        raise UserError(
            "plan-seeds: seed_sd and episode_sd are both 0; at least one must be above 0"
        )
    try:
        size = sample_size(difference, seed_sd=sd, power=power, level=1 - 0.05 / comparisons)
    except ValueError:
        return SeedPlan(episodes, None, None)
    noise = np.random.default_rng(0).normal(size=(EXPERIMENTS, MAX_SEEDS))
    for seeds in range(max(FEWEST_SEEDS, size.seeds), MAX_SEEDS + 1):
        drawn = difference + sd * noise[:, :seeds]
        detected = [first_method_wins(deltas, comparisons=comparisons) for deltas in drawn]
        if np.mean(detected) >= power:
            return SeedPlan(episodes, seeds, interval(detected, kind="share"))
    return SeedPlan(episodes, None, None)


def estimate_deviations(runs: Sequence[RunRecord], metric: str) -> DifferenceDeviations:
    """Estimate the standard deviations from runs of one or two methods with several seeds.

    With one method, the values of the second method are assumed to be independent and equally
    variable, which is cautious: equal training seeds and episodes usually reduce the variance.

    Args:
        runs: Evaluated runs.
        metric: Name of the metric.

    Raises:
        UserError: There are not one or two trained methods, there is not exactly one common
            setting, or there are too few seeds or episodes.
    """
    values = collect_metric_values(runs, metric)
    trained = {
        name: m for name, m in values.methods.items() if name not in values.untrained_methods
    }
    if len(trained) not in (1, 2):
        raise UserError(
            f"plan-seeds: give the runs of one or two trained methods, got {len(trained)} "
            f"({', '.join(trained) or 'none was evaluated on episodes'})"
        )
    columns = _values_or_differences_by_seed(trained)
    units = min(column.size for column in columns)
    if units < 2:
        raise UserError("plan-seeds: a run was evaluated on fewer than 2 episodes or prompts")
    scale = math.sqrt(2) if len(trained) == 1 else 1.0
    episode_sd = scale * math.sqrt(np.mean([column.var(ddof=1) for column in columns]))
    names = " and ".join(trained)
    if len(columns) < 2:
        common = "common " if len(trained) == 2 else ""
        raise UserError(
            f"plan-seeds: {names}: there is only one {common}training seed, so the variance "
            "between seeds is unknown: give --seed_sd and --episode_sd "
            f"{episode_sd:.3g}, or runs with more seeds"
        )
    means = np.array([column.mean() for column in columns])
    total_sd = scale * float(means.std(ddof=1))
    evaluation_variance = episode_sd**2 / units
    seed_sd = math.sqrt(max(0.0, total_sd**2 - evaluation_variance))
    limit = upper_standard_deviation(total_sd, len(columns) - 1)
    seed_limit = math.sqrt(max(0.0, limit**2 - evaluation_variance))
    notes = [
        f"the standard deviations are estimated from {len(columns)} training seeds of {names}; "
        f"the upper 80% confidence limit of the one over training seeds is {seed_limit:.3g}"
    ]
    if len(trained) == 1:
        notes.append(
            f"only {names} was measured: another method is assumed to be equally variable and "
            "independent of it"
        )
    if seed_sd == 0:
        notes.append(
            "the pilot shows no variance between training seeds beyond that of its episodes, which "
            "does not mean that there is none: use the column with the upper limit"
        )
    return DifferenceDeviations(seed_sd, episode_sd, seed_limit, tuple(notes))


def _values_or_differences_by_seed(methods: Mapping[str, MethodValues]) -> list[np.ndarray]:
    """Return the value, or the paired difference, of each unit, for each training seed.

    Training seeds and units that only one of two methods has are omitted.

    Args:
        methods: Name -> values of one or two methods.

    Raises:
        UserError: The methods were not evaluated in exactly one common setting, or share no seeds
            or units.
    """
    settings = set.intersection(*(set(method) for method in methods.values()))
    if len(settings) != 1:
        known = ", ".join(" ".join(setting) for setting in sorted(settings)) or "none"
        raise UserError(
            "plan-seeds: the runs must have one common environment and decoding, but they have "
            f"{known}"
        )
    setting = settings.pop()
    first, *others = (method[setting] for method in methods.values())
    if not others:
        return [unit_means(episodes, list(episodes)) for episodes in first.values()]
    columns = []
    for seed in sorted(first.keys() & others[0].keys()):
        one, other = first[seed], others[0][seed]
        if common := [unit for unit in one if unit in other]:
            columns.append(unit_means(one, common) - unit_means(other, common))
    if not columns:
        raise UserError(
            f"plan-seeds: {' and '.join(methods)} share no training seed with common episodes"
        )
    return columns
