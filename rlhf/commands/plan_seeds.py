"""Implements `rlhf plan-seeds`, which plans the numbers of training seeds and episodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.common.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, ProperFraction
from rlhf.common.text import count_text, markdown_table
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.evaluation.seed_plan import DifferenceDeviations, SeedPlan


@dataclass(frozen=True)
class PlanSeedsConfig:
    """Configuration of `rlhf plan-seeds`."""

    difference: PositiveFloat
    """Smallest difference between two methods that the experiment must detect, in units of the
    metric."""
    runs: list[str] = field(default_factory=list)
    """Evaluated runs of one or two methods with several training seeds, from which the standard
    deviations are estimated."""
    metric: str | None = None
    """Metric of the runs; the default is that of rlhf compare."""
    seed_sd: NonNegativeFloat | None = None
    """Standard deviation of the difference over training seeds, instead of runs."""
    episode_sd: NonNegativeFloat | None = None
    """Standard deviation of the difference over the episodes of one training seed, instead of
    runs."""
    episodes: list[PositiveInt] = field(default_factory=lambda: [64, 256, 1024])
    """Numbers of evaluation episodes to plan for."""
    power: ProperFraction = 0.8
    """Probability with which the difference must be detected."""
    comparisons: PositiveInt = 1
    """Number of comparisons of the experiment, for the Bonferroni correction."""
    json: bool = False
    """Print JSON instead of Markdown."""

    def __post_init__(self) -> None:
        are_set = self.seed_sd is not None, self.episode_sd is not None
        if self.runs and any(are_set):
            raise UserError("plan-seeds: give runs, or --seed_sd and --episode_sd, but not both")
        if not self.runs and not all(are_set):
            raise UserError(
                "plan-seeds: give --seed_sd and --episode_sd, or evaluated runs with several "
                "training seeds from which they are estimated"
            )
        if not self.episodes:
            raise UserError("plan-seeds: --episodes is empty: give at least one number")
        if self.metric and not self.runs:
            raise UserError("plan-seeds: --metric has no effect without runs")


def report_seed_plan(config: PlanSeedsConfig) -> Iterator[str]:
    """Yield the plan as Markdown or JSON.

    Raises:
        UserError: The runs are not suitable, or there is no variance.
    """
    from rlhf.evaluation.seed_plan import DifferenceDeviations, plan_seeds

    spread = (
        _deviations_of_runs(config)
        if config.runs
        else DifferenceDeviations(config.seed_sd or 0.0, config.episode_sd or 0.0)
    )
    limits = [spread.seed_sd] + [spread.seed_sd_limit] * (spread.seed_sd_limit is not None)
    plans_by_episodes = [
        [
            plan_seeds(
                config.difference,
                seed_sd=limit or 0.0,
                episode_sd=spread.episode_sd,
                episodes=episodes,
                power=config.power,
                comparisons=config.comparisons,
            )
            for limit in limits
        ]
        for episodes in config.episodes
    ]
    yield (
        _plan_json(config, spread, plans_by_episodes)
        if config.json
        else _plan_markdown(config, spread, plans_by_episodes)
    )


def _deviations_of_runs(config: PlanSeedsConfig) -> DifferenceDeviations:
    """Return the standard deviations that are estimated from the runs.

    Raises:
        UserError: The runs are not suitable.
    """
    from rlhf.evaluation.compare import default_metric
    from rlhf.evaluation.records import read_runs
    from rlhf.evaluation.seed_plan import estimate_deviations

    runs = [run for directory in config.runs for run in read_runs(Path(directory))]
    return estimate_deviations(runs, config.metric or default_metric(runs))


def _plan_markdown(
    config: PlanSeedsConfig, spread: DifferenceDeviations, plans_by_episodes: list[list[SeedPlan]]
) -> str:
    columns = ["episodes", "seeds", "power"]
    if spread.seed_sd_limit is not None:
        columns = ["episodes", "seeds (estimate)", "power", "seeds (upper limit)", "power"]
    rows = [
        [str(row[0].episodes), *(cell for size in row for cell in _seeds_and_power_cells(size))]
        for row in plans_by_episodes
    ]
    deviations = f"{spread.seed_sd:.3g} over training seeds, {spread.episode_sd:.3g} over episodes"
    notes = [
        f"standard deviation of the difference: {deviations}",
        *spread.notes,
        "the power is the probability that rlhf compare declares the better method the winner, "
        f"with its 95% interval, for normally distributed differences "
        f"({count_text(config.comparisons, 'comparison')}); if some runs fail "
        "completely, more seeds are needed",
        "each of the two methods needs this number of training seeds, the same ones",
    ]
    head = f"Training seeds to detect a difference of {config.difference:g} with a power of "
    return "\n\n".join(
        [
            f"{head}{100 * config.power:g}%",
            markdown_table(columns, rows),
            "\n".join(f"- {n}" for n in notes),
        ]
    )


def _seeds_and_power_cells(size: SeedPlan) -> list[str]:
    """Return the cells of a planned size: the number of seeds and the power."""
    from rlhf.evaluation.seed_plan import MAX_SEEDS

    if size.seeds is None or size.power is None:
        return [f"more than {MAX_SEEDS}", ""]
    power = size.power
    return [str(size.seeds), f"{power.value:.1%} [{power.low:.1%}, {power.high:.1%}]"]


def _plan_json(
    config: PlanSeedsConfig, spread: DifferenceDeviations, plans_by_episodes: list[list[SeedPlan]]
) -> str:
    def tree(size: SeedPlan) -> dict[str, Any]:
        return {**asdict(size), "power": size.power and size.power.as_dict()}

    plans = [
        {"estimate": tree(row[0])} | ({"upper_limit": tree(row[1])} if len(row) > 1 else {})
        for row in plans_by_episodes
    ]
    settings = {key: getattr(config, key) for key in ("difference", "power", "comparisons")}
    return json.dumps({**settings, **asdict(spread), "plans": plans}, indent=2, ensure_ascii=False)
