"""Group runs by method and training seed, and collect the metric values of each group."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.common.text import count_text
from rlhf.evaluation.metric_limits import MetricLimits
from rlhf.evaluation.metrics import UnitName, binary_values, unit_name
from rlhf.evaluation.records import (
    Evaluation,
    RunRecord,
    episode_value,
)

_SEED_PART = re.compile(r"[-_.]?seed[-_=]?(\d+)", re.IGNORECASE)

Setting = tuple[str, str]
"""Environment and decoding of an evaluation. Methods are compared only within one setting. The
random and the expert policy have no decoding, so they are compared with every decoding."""
ValuesByUnit = dict[Hashable, list[float]]
"""Independent unit -> values of the metric, one for each episode of the unit."""
MethodValues = dict[Setting, dict[int, ValuesByUnit]]
"""Setting -> training seed -> values of the metric by independent unit."""


def unit_means(values: ValuesByUnit, units: Iterable[Hashable]) -> np.ndarray:
    """Return the mean of the metric over the episodes of each of `units`, [units]."""
    return np.array([np.mean(values[unit]) for unit in units])


def method_names(directories: Sequence[Path]) -> list[str]:
    """Return the name of the method of each run directory.

    A method's name is the last k components of the directory's path, without parts such as `seed3`.
    k is the smallest number for which all different methods have different names.
    """
    paths = []
    for directory in directories:
        parts = [_SEED_PART.sub("", part) for part in directory.resolve().parts]
        paths.append([part for part in parts if part] or ["run"])
    return _shortest_distinct_tails(paths)


def run_names(directories: Sequence[Path]) -> list[str]:
    """Return the last k components of each directory's path as its name.

    k is the smallest number for which all different directories have different names.
    """
    return _shortest_distinct_tails([list(directory.resolve().parts) for directory in directories])


def _shortest_distinct_tails(paths: Sequence[list[str]]) -> list[str]:
    """Return the last k components of each path.

    k is the smallest number for which different paths have different results.
    """
    distinct = len({tuple(parts) for parts in paths})
    depth = 1
    while len({tuple(parts[-depth:]) for parts in paths}) < distinct:
        depth += 1
    return ["/".join(parts[-depth:]) for parts in paths]


@dataclass(frozen=True)
class MethodEvaluation:
    """An evaluation with its method and training seed."""

    evaluation: Evaluation
    method: str
    """Name of the method, see `method_names`, or of the policy that is not trained."""
    seed: int
    """Training seed; 0 for a policy that is not trained."""

    @property
    def has_untrained_policy(self) -> bool:
        """Whether the policy is not trained, see `Evaluation.has_untrained_policy`."""
        return self.evaluation.has_untrained_policy


def method_evaluations(runs: Sequence[RunRecord]) -> list[MethodEvaluation]:
    """Return the evaluations that are compared, each with its method and training seed.

    One run of `rlhf evaluate` can evaluate the models of several training runs. The method of such
    an evaluation is named after the policy, not after the directory. The evaluation replaces the
    final evaluation of a training run with the same method name, training seed and setting.
    Evaluations without episodes are omitted.
    """
    return _evaluations_and_omission_notes(runs)[0]


def _evaluations_and_omission_notes(
    runs: Sequence[RunRecord],
) -> tuple[list[MethodEvaluation], list[str]]:
    """Return the evaluations to use, and notes on those that are omitted because of equal names.

    There are no notes on untrained policies, or on evaluations of training runs that those of `rlhf
    evaluate` replace; see `method_evaluations`.
    """
    # Runs of `rlhf evaluate` with named policies come first, so that their evaluations replace
    # those of training runs. The table of a comparison lists the methods in this order.
    ordered = sorted(runs, key=lambda run: not _methods_named_after_policies(run))
    pairs = [(run, e) for run in ordered for e in run.evaluations if e.episodes]
    paths = [_path_for_method_name(run, evaluation) for run, evaluation in pairs]
    owners: dict[tuple[str, int, str, str], tuple[RunRecord, Path]] = {}
    selected, notes = [], []
    for (run, evaluation), path, label in zip(pairs, paths, method_names(paths), strict=True):
        policy = evaluation.summary_field("policy")
        method, seed = (
            (policy, 0) if evaluation.has_untrained_policy else (label, training_seed(run))
        )
        setting = (evaluation.summary_field("env"), evaluation.summary_field("decoding"))
        owner, owner_path = owners.setdefault((method, seed, *setting), (run, path))
        item = MethodEvaluation(evaluation, method, seed)
        if owner.directory == run.directory:
            selected.append(item)
        elif not item.has_untrained_policy and (
            path != owner_path or _methods_named_after_policies(run)
        ):
            notes.append(
                f"{run.name}: the evaluation of {method} is omitted, because {owner.name} has an "
                "evaluation with the same name; compare them separately"
            )
    return selected, notes


@dataclass(frozen=True)
class MetricValuesByMethod:
    """Values of one metric for every method."""

    methods: dict[str, MethodValues]
    """Name of the method -> its values."""
    notes: list[str]
    """Notes on omitted evaluations, and on omitted or repeated episodes."""
    binary_values_by_env: Mapping[str, tuple[float, float] | None]
    """Environment -> the two possible values of a binary metric, see `binary_values`; None for
    other metrics."""
    limits: Mapping[tuple[str, Setting], MetricLimits]
    """(method, setting) -> known limits of the metrics in its evaluations."""
    untrained_methods: frozenset[str]
    """Methods that are not trained: reference policies, functions and models on servers."""
    unit_names: Mapping[Setting, UnitName]
    """Setting -> name of its independent units, see `unit_name`."""


def collect_metric_values(runs: Sequence[RunRecord], metric: str) -> MetricValuesByMethod:
    """Collect the values of `metric` by method, setting, training seed and independent unit.

    Raises:
        UserError: An episode does not have the metric. An episode in which the metric could not be
            scored has it without a value, and is omitted.
    """
    methods: dict[str, MethodValues] = {}
    unscored: Counter[str] = Counter()
    samples: dict[tuple[str, Setting, int], Counter[tuple[int, int]]] = defaultdict(Counter)
    values: dict[str, list[float]] = defaultdict(list)
    limits: dict[tuple[str, Setting], list[MetricLimits]] = defaultdict(list)
    names: dict[Setting, UnitName] = {}
    evaluations, left_out = _evaluations_and_omission_notes(runs)
    for item in evaluations:
        rows = item.evaluation.episodes
        for row, unit in zip(rows, item.evaluation.unit_of_each_episode, strict=True):
            value = episode_value(row, metric)
            if value is None:
                unscored[item.method] += 1
                continue
            setting = (str(row["env"]), str(row["decoding"]))
            seeds = methods.setdefault(item.method, {}).setdefault(setting, {})
            seeds.setdefault(item.seed, {}).setdefault(unit, []).append(value)
            samples[item.method, setting, item.seed][row["seed"], row.get("sample", 0)] += 1
            values[setting[0]].append(value)
        setting = (str(rows[0]["env"]), str(rows[0]["decoding"]))
        limits[item.method, setting].append(item.evaluation.limits)
        name = unit_name(item.evaluation.unit_of_each_episode)
        names[setting] = name if name != "episodes" else names.get(setting, name)
    notes = [
        f"{name}: 1 episode has no {metric} and is omitted"
        if n == 1
        else f"{name}: {n} episodes have no {metric} and are omitted"
        for name, n in unscored.items()
    ]
    notes += left_out
    notes += [
        f"{name}: {count_text(repeated, 'episode')} with a repeated evaluation seed; episodes of "
        "one seed are averaged"
        for (name, *_), counts in samples.items()
        if (repeated := sum(n - 1 for n in counts.values()))
    ]
    by_env: dict[str, list[MetricLimits]] = defaultdict(list)
    for (_, (env, _)), evaluation_limits in limits.items():
        by_env[env] += evaluation_limits
    binary_values_by_env = {
        env: binary_values(metric, column, MetricLimits.common_to(by_env[env]))
        for env, column in values.items()
    }
    untrained_methods = frozenset(item.method for item in evaluations if item.has_untrained_policy)
    common = {
        key: MetricLimits.common_to(evaluation_limits) for key, evaluation_limits in limits.items()
    }
    return MetricValuesByMethod(
        methods, notes, binary_values_by_env, common, untrained_methods, names
    )


def training_seed(run: RunRecord) -> int:
    """Return the training seed of a run.

    The seed is the last number in the run's path that follows "seed", as in `seed3`. If there is no
    such number, it is the value of `seed` in the configuration, or 0 if there is none.
    """
    numbers = _SEED_PART.findall(str(run.directory.resolve()))
    return int(numbers[-1]) if numbers else int(run.config.get("seed") or 0)


def _methods_named_after_policies(run: RunRecord) -> bool:
    """Return whether the methods of a run are named after the policies that it evaluated.

    They are if the configuration lists policies, or if the run evaluated several trained policies.
    """
    trained = {e.summary_field("policy") for e in run.evaluations if not e.has_untrained_policy} - {
        ""
    }
    return "policies" in run.config or len(trained) > 1


def _path_for_method_name(run: RunRecord, evaluation: Evaluation) -> Path:
    """Return the path from which `method_names` derives the name of an evaluation's method.

    It is the run directory. If the methods of the run are named after its policies, the last
    component of the path is replaced by the name of the policy.
    """
    named = _methods_named_after_policies(run) and evaluation.summary_field("policy")
    return run.directory.resolve().parent / Path(named).name if named else run.directory
