"""Read the scores of a finished benchmark, and compute aggregates, curves and comparisons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import UserError
from rlhf.evaluation.metric_limits import ReferenceReturns
from rlhf.evaluation.records import read_summary_file
from rlhf.evaluation.significance import Difference, compare_means
from rlhf.runs.renamed import read_metrics
from rlhf.stats import Interval, interval
from rlhf.stats.aggregates import (
    aggregate_interval,
    improvement_probability_interval,
    iqm,
    iqm_intervals_by_step,
    mean,
    optimality_gap,
    performance_profile,
)
from rlhf.studies.bench.plan import REFERENCE_FOLDER, Bench

SCORE_METRIC = "normalized return"
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(21))
"""Thresholds of the performance profile."""


@dataclass(frozen=True)
class BenchScores:
    """Normalized mean returns on the held-out episodes.

    A row is an algorithm, the initial model or a policy that is not trained.
    """

    environments: tuple[str, ...]
    seeds: tuple[int, ...]
    reference_returns: Mapping[str, ReferenceReturns]
    trained: Mapping[str, np.ndarray]
    """Row -> [seeds, environments]; the initial model is the first row."""
    untrained: Mapping[str, np.ndarray]
    """Row that is not trained -> [1, environments]; nan where an environment has no such policy."""
    curves: Mapping[str, np.ndarray]
    """Algorithm -> [seeds, environments, points] during training, without the initial model."""

    @property
    def scores_by_row(self) -> dict[str, np.ndarray]:
        """All rows, untrained first."""
        return {**self.untrained, **self.trained}


@dataclass(frozen=True)
class Findings:
    """Aggregates and comparisons of a benchmark; all intervals are 95% confidence intervals."""

    aggregates: Mapping[str, Mapping[str, Interval]]
    """Row that all environments have -> name (IQM, mean, optimality gap) -> aggregate over seeds
    and environments. IQM is the interquartile mean."""
    improvement: Mapping[str, Interval]
    """Trained row other than the baseline -> probability that a run of the row has a higher score
    than a run of the baseline; ties count half."""
    cells: Mapping[str, Mapping[str, Interval]]
    """Row -> environment -> mean over training seeds, if the environment has the row."""
    profile: Mapping[str, np.ndarray]
    """Trained row -> proportion of runs with a score above each of `THRESHOLDS`."""
    curves: Mapping[str, list[Interval]]
    """Algorithm -> IQM at the start and at each point during training."""
    against_baseline: list[Difference]
    """Differences between every other trained row and the baseline."""
    pairs: list[Difference]
    """Differences between all pairs of algorithms other than the baseline."""

    @property
    def differences(self) -> list[Difference]:
        """All differences; the differences from the baseline come first."""
        return [*self.against_baseline, *self.pairs]


def read_scores(bench: Bench) -> BenchScores:
    """Read the scores of a benchmark whose jobs are all finished.

    Raises:
        UserError: A summary is missing or damaged, the random or optimal return of an environment
            is unknown, or the optimal return is not above the random return.
    """
    names, seeds = tuple(bench.environments), tuple(bench.config.seeds)
    start = {n: bench.run_path(n, f"seed{seeds[0]}", "evaluate") for n in names}
    bounds = {
        n: environment_reference_returns(
            bench, n, read_evaluation_summary(start[n], bench.initial_row_name)
        )
        for n in names
    }

    def scores_of_row(row: str, folders: Sequence[str]) -> np.ndarray:
        """Return the scores [folders, environments] of a row, given the folders of its runs."""
        summaries = [
            [read_evaluation_summary(bench.run_path(n, f), row) for n in names] for f in folders
        ]
        return np.array(
            [
                [bounds[n].normalize(mean_return(s)) for n, s in zip(names, run, strict=True)]
                for run in summaries
            ]
        )

    def untrained_row_scores(row: str) -> np.ndarray:
        """Return the scores [1, environments] of a row that is not trained."""
        scores = [
            bounds[n].normalize(
                mean_return(read_evaluation_summary(bench.run_path(n, REFERENCE_FOLDER), row))
            )
            if row in bench.untrained_rows_of(n)
            else math.nan
            for n in names
        ]
        return np.array([scores])

    folders = {bench.initial_row_name: "evaluate"} | {name: name for name in bench.algorithms}
    return BenchScores(
        environments=names,
        seeds=seeds,
        reference_returns=bounds,
        trained={
            row: scores_of_row(row, [f"seed{seed}/{folder}" for seed in seeds])
            for row, folder in folders.items()
        },
        untrained={row: untrained_row_scores(row) for row in bench.untrained_rows},
        curves={row: _training_curves(bench, row, bounds) for row in bench.algorithms},
    )


def analyze_scores(scores: BenchScores, *, baseline: str) -> Findings:
    """Compute aggregates and comparisons.

    All trained rows are compared with the row `baseline`. The algorithms are also compared with
    each other.
    """
    rows, start = scores.scores_by_row, next(iter(scores.trained))
    algorithms = [name for name in scores.trained if name != start]
    others = [name for name in scores.trained if name != baseline]
    pairs = [p for p in itertools.combinations(algorithms, 2) if baseline not in p]
    comparisons = len(others) + len(pairs)
    return Findings(
        aggregates={
            name: _aggregate_intervals(table)
            for name, table in rows.items()
            if np.isfinite(table).all()
        },
        improvement={
            name: improvement_probability_interval(rows[name], rows[baseline]) for name in others
        },
        cells={
            name: {
                env: interval(table[:, i], kind="mean")
                for i, env in enumerate(scores.environments)
                if np.isfinite(table[:, i]).all()
            }
            for name, table in rows.items()
        },
        profile={name: performance_profile(t, THRESHOLDS) for name, t in scores.trained.items()},
        curves={name: _iqm_curve(scores, name) for name in algorithms},
        against_baseline=[
            _compare_rows(rows, a, baseline, comparisons=comparisons) for a in others
        ],
        pairs=[_compare_rows(rows, a, b, comparisons=comparisons) for a, b in pairs],
    )


def _aggregate_intervals(table: np.ndarray) -> dict[str, Interval]:
    """Return the IQM, the mean and the optimality gap of scores [seeds, environments]."""
    statistics = {"IQM": iqm, "mean": mean, "optimality gap": optimality_gap}
    return {
        name: aggregate_interval(table, statistic, rng=np.random.default_rng(0))
        for name, statistic in statistics.items()
    }


def _iqm_curve(scores: BenchScores, name: str) -> list[Interval]:
    """Return the IQM of the initial model and of every evaluation during training."""
    start = next(iter(scores.trained.values()))
    curves = np.concatenate([start[:, :, None], scores.curves[name]], axis=2)
    return iqm_intervals_by_step(curves, rng=np.random.default_rng(0))


def _compare_rows(
    rows: Mapping[str, np.ndarray], method: str, baseline: str, *, comparisons: int
) -> Difference:
    """Compare the mean scores over environments of two rows, paired by training seed."""
    left, right = np.broadcast_arrays(rows[method].mean(axis=1), rows[baseline].mean(axis=1))
    return compare_means(
        left,
        right,
        method=method,
        baseline=baseline,
        unit="training seeds",
        env="all environments",
        metric=SCORE_METRIC,
        comparisons=comparisons,
    )


def read_evaluation_summary(run: Path, policy: str) -> dict[str, Any]:
    """Read the `summary.json` of a policy in a run directory.

    Raises:
        UserError: The file does not exist, because the run is not finished, or the file is damaged.
    """
    path = run / "evaluation" / policy / "summary.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: continue the study with --resume")
    return read_summary_file(path)


def mean_return(summary: Mapping[str, Any]) -> float:
    """Return the mean return over the episodes from a summary."""
    return float(summary["metrics"]["return"]["mean"])


def environment_reference_returns(
    bench: Bench, environment: str, summary: Mapping[str, Any]
) -> ReferenceReturns:
    """Return the random and the optimal return of an environment.

    The values of the manifest take precedence over those of `summary`, the summary of an evaluation
    in the environment.

    Raises:
        UserError: A value is unknown, or the optimal return is not above the random return.
    """
    task = bench.environments[environment]
    low = summary["random"] if task.random is None else task.random
    high = summary["optimal"] if task.optimal is None else task.optimal
    for key, value in (("random", low), ("optimal", high)):
        if value is None:
            raise UserError(
                f"environments.{environment}: the {key} return of {task.env.id} is unknown, but "
                f"scores are normalized with it: set the key {key} in the manifest"
            )
    if low >= high:
        raise UserError(
            f"environments.{environment}: random must be below optimal, got {low} and {high}"
        )
    return ReferenceReturns(low, high)


def _training_curves(
    bench: Bench, algorithm: str, bounds: Mapping[str, ReferenceReturns]
) -> np.ndarray:
    """Return the held-out scores of an algorithm during training, [seeds, environments, points]."""

    def scores_during_training(environment: str, seed: int) -> list[float]:
        rows = read_metrics(bench.run_path(environment, f"seed{seed}", algorithm))
        values = [row["eval/return"] for row in rows if "eval/return" in row]
        # If a run ended early, its last score is used for the remaining points.
        values += values[-1:] * (bench.config.curve_points - len(values))
        return [bounds[environment].normalize(value) for value in values]

    return np.array(
        [
            [scores_during_training(name, seed) for name in bench.environments]
            for seed in bench.config.seeds
        ]
    )
