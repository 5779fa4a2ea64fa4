"""Group runs by method and training seed, and collect the metric values of each group."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.evaluation.metrics import UnitName, outcome_range, unit_name
from rlhf.evaluation.records import (
    REFERENCE_POLICIES,
    Bounds,
    Evaluation,
    RunRecord,
    episode_value,
)

_SEED_PART = re.compile(r"[-_.]?seed[-_=]?(\d+)", re.IGNORECASE)

Setting = tuple[str, str]
"""(environment, decoding); values are compared only within one setting."""
Episodes = dict[Hashable, list[float]]
"""Independent unit -> metric values of its episodes."""
Method = dict[Setting, dict[int, Episodes]]
"""Setting -> training seed -> episodes."""


def method_names(directories: Sequence[Path]) -> list[str]:
    """Return the method of each directory, named by the end of its path without seed parts.

    Names consist of as many path components as are needed to distinguish the methods.
    """
    paths = []
    for directory in directories:
        parts = [_SEED_PART.sub("", part) for part in directory.resolve().parts]
        paths.append([part for part in parts if part] or ["run"])
    return _shortest_tails(paths)


def name_runs(directories: Sequence[Path]) -> list[str]:
    """Return the shortest end of each directory's path that distinguishes it from the others."""
    return _shortest_tails([list(directory.resolve().parts) for directory in directories])


def _shortest_tails(paths: Sequence[list[str]]) -> list[str]:
    distinct = len({tuple(parts) for parts in paths})
    depth = 1
    while len({tuple(parts[-depth:]) for parts in paths}) < distinct:
        depth += 1
    return ["/".join(parts[-depth:]) for parts in paths]


@dataclass(frozen=True)
class MethodEvaluation:
    """An evaluation, with its method and training seed."""

    evaluation: Evaluation
    method: str
    seed: int
    """Training seed; 0 for a reference policy."""

    @property
    def is_reference(self) -> bool:
        """Whether the policy is a reference policy (random or expert)."""
        return self.method in REFERENCE_POLICIES


def method_evaluations(runs: Sequence[RunRecord]) -> list[MethodEvaluation]:
    """Return every evaluation that has episodes, with its method and training seed.

    `rlhf evaluate` can evaluate the models of several runs in one directory. Such an
    evaluation is named after the policy instead of the directory. It replaces the final evaluation
    of the training run of that name.
    """
    return _select_evaluations(runs)[0]


def _select_evaluations(
    runs: Sequence[RunRecord],
) -> tuple[list[MethodEvaluation], list[str]]:
    """Return the evaluations to use, and notes on those left out because of an equal name."""
    # Evaluation runs with named policies come first, because they define the order of the table.
    ordered = sorted(runs, key=lambda run: not _names_policies(run))
    pairs = [(run, e) for run in ordered for e in run.evaluations if e.episodes]
    paths = [_run_directory(run, evaluation) for run, evaluation in pairs]
    owners: dict[tuple[str, int, str, str], tuple[RunRecord, Path]] = {}
    selected, notes = [], []
    for (run, evaluation), path, label in zip(pairs, paths, method_names(paths), strict=True):
        policy = evaluation.describe("policy")
        method, seed = (policy, 0) if policy in REFERENCE_POLICIES else (label, training_seed(run))
        setting = (evaluation.describe("env"), evaluation.describe("decoding"))
        owner, owner_path = owners.setdefault((method, seed, *setting), (run, path))
        item = MethodEvaluation(evaluation, method, seed)
        if owner.directory == run.directory:
            selected.append(item)
        elif not item.is_reference and (path != owner_path or _names_policies(run)):
            notes.append(
                f"{run.name}: the evaluation of {method} was left out, because {owner.name} has "
                "one of the same name; compare them separately"
            )
    return selected, notes


@dataclass(frozen=True)
class MethodValues:
    """Values of one metric for every method."""

    methods: dict[str, Method]
    notes: list[str]
    """Notes on omitted or repeated episodes."""
    ranges: Mapping[str, tuple[float, float] | None]
    """Environment -> smallest and largest possible value, if known."""
    limits: Mapping[str, Bounds | None]
    """Environment -> values of its random and its optimal policy."""
    unit_names: Mapping[Setting, UnitName]
    """Setting -> name of its independent units, see `unit_name`."""


def collect_methods(runs: Sequence[RunRecord], metric: str) -> MethodValues:
    """Group the values of `metric` by method, setting, training seed and independent unit."""
    methods: dict[str, Method] = {}
    unscored: Counter[str] = Counter()
    samples: dict[tuple[str, Setting, int], Counter[tuple[int, int]]] = defaultdict(Counter)
    values: dict[str, list[float]] = defaultdict(list)
    limits: dict[str, Bounds | None] = {}
    names: dict[Setting, UnitName] = {}
    evaluations, left_out = _select_evaluations(runs)
    for item in evaluations:
        rows = item.evaluation.episodes
        for row, unit in zip(rows, item.evaluation.units, strict=True):
            value = episode_value(row, metric)
            if value is None:
                unscored[item.method] += 1
                continue
            setting = (str(row["env"]), str(row["decoding"]))
            seeds = methods.setdefault(item.method, {}).setdefault(setting, {})
            seeds.setdefault(item.seed, {}).setdefault(unit, []).append(value)
            samples[item.method, setting, item.seed][row["seed"], row.get("sample", 0)] += 1
            values[setting[0]].append(value)
            limits[setting[0]] = item.evaluation.bounds
        setting = (str(rows[0]["env"]), str(rows[0]["decoding"]))
        name = unit_name(item.evaluation.units)
        names[setting] = name if name != "episodes" else names.get(setting, name)
    notes = [f"{name}: {n} episodes without {metric} left out" for name, n in unscored.items()]
    notes += left_out
    notes += [
        f"{name}: {repeated} episodes repeat an evaluation seed and are averaged with the first"
        for (name, *_), counts in samples.items()
        if (repeated := sum(n - 1 for n in counts.values()))
    ]
    ranges = {env: outcome_range(metric, column, limits[env]) for env, column in values.items()}
    return MethodValues(methods, notes, ranges, limits, names)


def training_seed(run: RunRecord) -> int:
    """Return the seed in the run's path (`seed3`), else in its configuration, else 0."""
    numbers = _SEED_PART.findall(str(run.directory.resolve()))
    return int(numbers[-1]) if numbers else int(run.config.get("seed") or 0)


def _names_policies(run: RunRecord) -> bool:
    """Return whether a run directory evaluated policies under their own names."""
    trained = {e.describe("policy") for e in run.evaluations} - {*REFERENCE_POLICIES, ""}
    return "policies" in run.config or len(trained) > 1


def _run_directory(run: RunRecord, evaluation: Evaluation) -> Path:
    """Return the directory of the run whose model was evaluated."""
    named = _names_policies(run) and evaluation.describe("policy")
    return run.directory.resolve().parent / Path(named).name if named else run.directory
