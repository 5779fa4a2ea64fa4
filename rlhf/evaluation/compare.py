"""`rlhf compare RUN...`: paired comparison of methods on common evaluation seeds.

Runs whose paths differ only in a part such as `seed3` are training seeds of one method. With
several training seeds, intervals are over training seeds. With one run of each method, intervals
are over episodes, and the result holds for these two models only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, combinations
from pathlib import Path

import numpy as np

from rlhf.common.names import nearest
from rlhf.common.text import markdown_table, markdown_text
from rlhf.errors import UserError
from rlhf.evaluation.metrics import UnitName, metric_interval
from rlhf.evaluation.records import REFERENCE_POLICIES, RunRecord, read_stages
from rlhf.evaluation.run_groups import (
    Episodes,
    MethodValues,
    Setting,
    collect_methods,
    method_evaluations,
    training_seed,
)
from rlhf.evaluation.significance import FEWEST_SEEDS, Difference, Unit, compare_means
from rlhf.stats import Interval, interval

MAX_PAIRED_METHODS = 6
"""Largest number of trained methods of which all pairs are compared (15 comparisons)."""


@dataclass(frozen=True)
class MethodScore:
    """Mean of the metric for one method in one setting."""

    method: str
    env: str
    decoding: str
    unit: Unit
    estimate: Interval
    episodes: int


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`; `notes` lists omitted data and caveats."""

    metric: str
    baseline: str
    rows: list[MethodScore]
    differences: list[Difference]
    notes: list[str]

    def to_markdown(self) -> str:
        """Return Markdown: two tables, the verdicts, the measured coverage and the notes."""
        parts = _tables(self)
        parts += [
            f"- {markdown_text(f'{d.method} against {d.baseline}, {d.env} {d.decoding}')}: "
            f"**{markdown_text(d.verdict)}**"
            for d in self.differences
        ]
        coverage: dict[str, list[str]] = {}
        several = len({d.baseline for d in self.differences}) > 1
        for d in self.differences:
            name = f"{d.method} - {d.baseline}" if several else d.method
            coverage.setdefault(coverage_text(d), []).append(name)
        notes = [f"{text} ({', '.join(names)})" for text, names in coverage.items() if text]
        parts += [f"- {markdown_text(note)}" for note in (*notes, *self.notes)]
        return "\n".join(parts) + "\n"

    def to_json(self) -> str:
        """Return the comparison as JSON text; unknown interval ends are null."""
        tree = asdict(self)
        items = [*tree["rows"], *tree["differences"]]
        for item, source in zip(items, [*self.rows, *self.differences], strict=True):
            item["estimate"] = source.estimate.as_dict()
        return json.dumps(tree, indent=2, ensure_ascii=False)


def compare(
    run_dirs: Sequence[str | Path], *, metric: str | None = None, baseline: str | None = None
) -> Comparison:
    """Compare run or pipeline directories on the prompts or evaluation seeds they share.

    Args:
        run_dirs: run or pipeline directories.
        metric: an episode field (return, success, cost, ...), a reward component, or normalized (0
            for the random policy, 1 for the optimal one, if both are known); by default
            the result of `default_metric`.
        baseline: the method that others are compared with, by default the first. Without it the
            trained policies of a single pipeline are also compared with each other.

    Raises:
        UserError: no episodes were evaluated, a name is unknown, or the runs have no common units.
    """
    directories = [Path(directory).resolve() for directory in run_dirs]
    every_pair = baseline is None and len(directories) == 1
    if twice := [str(path) for path in directories if directories.count(path) > 1]:
        raise UserError(f"{twice[0]} is given twice: a run cannot be compared with itself")
    stages = [read_stages(directory) for directory in directories]
    comparison = compare_runs(
        list(chain(*stages)), metric=metric, baseline=baseline, every_pair=every_pair
    )
    left_out = [
        f"{directory.name}: no episodes were evaluated"
        for directory, runs in zip(directories, stages, strict=True)
        if not any(evaluation.episodes for run in runs for evaluation in run.evaluations)
    ]
    return replace(comparison, notes=[*comparison.notes, *left_out])


def compare_runs(
    runs: Sequence[RunRecord],
    *,
    metric: str | None = None,
    baseline: str | None = None,
    every_pair: bool = False,
    keep_going: bool = False,
) -> Comparison:
    """Compare run records in memory, as `compare` does for directories.

    With `every_pair`, up to `MAX_PAIRED_METHODS` trained methods are also compared with each other.
    If no two methods have a common unit, the result has no differences with `keep_going`; without
    it, UserError is raised. A single pair without a common unit only adds a note.
    """
    is_default = metric is None
    metric = metric or default_metric(runs, strict=not keep_going)
    values = collect_methods(runs, metric)
    methods, notes = values.methods, list(values.notes)
    if is_default and metric != "return":
        notes.append(f"compared by {metric}, as every return is 0; --metric names another")
    if baseline is None:
        trained = [name for name in methods if name not in REFERENCE_POLICIES]
        baseline = next(iter([*trained, *methods]), None)
    if not methods and any(e.episodes for run in runs for e in run.evaluations):
        raise UserError(f"no episode has a score of {metric}: {'; '.join(notes)}")
    if not methods:
        raise UserError(
            "no episodes were evaluated in these directories: run `rlhf evaluate` with env first "
            "(results on text, labels, tasks or pairs are in the report)"
        )
    if baseline not in methods:
        raise UserError(
            f"no evaluated method named {baseline!r} ({', '.join(methods)})"
            f"{nearest(str(baseline), methods)}{''.join(f'; {note}' for note in values.notes)}"
        )
    rows = [
        _method_score(name, setting, seeds, metric, values)
        for name, method in methods.items()
        for setting, seeds in method.items()
    ]
    opponents = _opponents(methods, baseline, every_pair=every_pair)
    differences, errors = _differences(values, opponents, metric, notes)
    if errors and not differences and not keep_going:
        raise errors[0]
    notes += [f"not compared: {error}" for error in errors]
    notes += _general_notes(differences)
    notes += _different_settings(runs, metric)
    if not differences and not errors:
        notes.append(
            f"nothing was compared: no other method was evaluated as {baseline} was, in the same "
            "environment with the same decoding"
        )
    return Comparison(metric, baseline, rows, differences, list(dict.fromkeys(notes)))


def _opponents(
    methods: Mapping[str, object], baseline: str, *, every_pair: bool
) -> list[tuple[str, str]]:
    """List the pairs to compare: every method with the baseline, then trained methods."""
    pairs = [(name, baseline) for name in methods if name != baseline]
    trained = [name for name in methods if name not in REFERENCE_POLICIES and name != baseline]
    if every_pair and len(trained) < MAX_PAIRED_METHODS:
        pairs += [(later, earlier) for earlier, later in combinations(trained, 2)]
    return pairs


def coverage_text(difference: Difference) -> str:
    """Return a sentence on the simulated coverage of a difference; "" if it has no interval."""
    shares = {
        "for normal differences": difference.coverage_normal,
        "redrawing the observed ones": difference.coverage_observed,
    }
    parts = [f"{share:.1%} {what}" for what, share in shares.items() if share is not None]
    if not parts:
        return ""
    size = f"{difference.estimate.units} {difference.unit}"
    return f"measured coverage of the 95% intervals at {size}: {', '.join(parts)}"


def format_estimate(estimate: Interval) -> str:
    """Return `0.412 [0.380, 0.444]`, or the value and the reason why there is no interval."""
    if not estimate.known:
        reason = estimate.needs or f"n = {estimate.units}"
        return f"{estimate.value:.3f} (no interval: {reason})"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def default_metric(runs: Sequence[RunRecord], *, strict: bool = True) -> str:
    """Return "return", or `headline_metric` if every return is 0, as with prompt sets.

    Raises:
        UserError: with `strict`, if every return is 0 and no reward has scores in all runs.
    """
    rows = [row for run in runs for e in run.evaluations for row in e.episodes]
    if any(row.get("return") for row in rows):
        return "return"
    metric = headline_metric(runs) or "return"
    if strict and metric == "return" and any(row.get("components") for row in rows):
        raise UserError(
            "every return is 0 and no reward has scores in all of these runs: evaluate them with "
            "the same rewards, or name a --metric"
        )
    return metric


def headline_metric(runs: Sequence[RunRecord]) -> str | None:
    """Return the main metric of a report: a gold component, else the return, else the reward.

    In a prompt set every return is 0; its main metric is the training reward, or "score" if that
    has several components.

    Returns:
        The name of the metric; None if no episodes were evaluated.
    """
    rows = [row for run in runs for e in run.evaluations for row in e.episodes]
    if not rows:
        return None
    scored = [
        {name for name, value in (row.get("components") or {}).items() if value is not None}
        for row in rows
    ]
    common = set.intersection(*({*(row.get("components") or {})} for row in rows))
    common &= set.union(*scored)
    gold = sorted(name for name in common if name.startswith("gold"))
    if gold:
        return gold[0]
    if not common or any(row.get("return") for row in rows):
        return "return"
    trained = ["score", *(name for run in runs for name in _reward_names(run, "rewards"))]
    monitored = {name for run in runs for name in _reward_names(run, "gold")}
    named = [name for name in trained if name in common]
    return next(iter([*named, *sorted(common - monitored), *sorted(common)]))


def _reward_names(run: RunRecord, key: str) -> list[str]:
    """Return the names of the rewards in a run's configuration."""
    return [_reward_name(spec) for spec in run.config.get(key) or [] if isinstance(spec, Mapping)]


def _reward_name(spec: Mapping[str, object]) -> str:
    """Return the component name of a reward: the function's name, or else the kind."""
    kind = spec.get("kind")
    default = str(spec.get("path")).rpartition(":")[2] if kind == "function" else kind
    return str(spec.get("name") or default)


def _method_score(
    method: str,
    setting: Setting,
    seeds: Mapping[int, Episodes],
    metric: str,
    values: MethodValues,
) -> MethodScore:
    env = setting[0]
    samples = [pair for units in seeds.values() for pair in units.items()]
    column = [value for _, unit_values in samples for value in unit_values]
    if len(seeds) > 1:
        means = [float(_unit_means(units, units).mean()) for units in seeds.values()]
        unit, estimate = "training seeds", interval(means, kind="mean", bounds=values.ranges[env])
    else:
        labels = [unit for unit, unit_values in samples for _ in unit_values]
        unit = values.unit_names[setting]
        estimate = metric_interval(metric, column, labels, values.limits[env])
    return MethodScore(method, *setting, unit, estimate, len(column))


def _unit_means(episodes: Episodes, units: Iterable[Hashable]) -> np.ndarray:
    """Return the mean over the episodes of each of `units`. [units]"""
    return np.array([np.mean(episodes[unit]) for unit in units])


@dataclass(frozen=True)
class _Pairing:
    """Training runs of a method and of the baseline in one setting."""

    method: str
    baseline: str
    setting: Setting
    unit: UnitName
    runs: Mapping[int, Episodes]
    """Training seed -> episodes of the method."""
    baseline_runs: Mapping[int, Episodes]
    """Training seed -> episodes of the baseline."""
    notes: list[str]
    """List to which notes on omitted data are added."""

    @property
    def names(self) -> str:
        """The names of both methods, for messages."""
        return f"{self.method} and {self.baseline}"

    def means(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the means [units] of both methods on common units, for each pair of runs.

        Raises:
            UserError: the runs have no common seeds or units.
        """
        return [
            self._common_units(self.runs[seed], self.baseline_runs[other])
            for seed, other in self._seeds()
        ]

    @property
    def run_counts(self) -> list[int]:
        """Numbers of training runs of those of the two methods that are trained."""
        runs_of = {self.method: self.runs, self.baseline: self.baseline_runs}
        return [len(runs) for name, runs in runs_of.items() if name not in REFERENCE_POLICIES]

    def shared_error(self) -> float:
        """Return the standard error of the mean difference due to a single reference evaluation.

        All training seeds are compared with one evaluation of the reference policy. The error is
        computed from the differences by unit, each the mean over the training seeds; it is infinite
        for a single unit.
        """
        runs = [*self.runs.values(), *self.baseline_runs.values()]
        common = [unit for unit in runs[0] if all(unit in run for run in runs)]
        if len(common) < 2:
            return math.inf
        first, second = (
            np.mean([_unit_means(run, common) for run in side.values()], axis=0)
            for side in (self.runs, self.baseline_runs)
        )
        return float((first - second).std(ddof=1)) / math.sqrt(len(common))

    def _seeds(self) -> list[tuple[int, int]]:
        """Return pairs of training seeds; a single run is paired with every run of the other."""
        first, second = self.runs, self.baseline_runs
        common = sorted(first.keys() & second.keys())
        if len(first) == 1 or len(second) == 1:
            return [(a, b) for a in sorted(first) for b in sorted(second)]
        if not common:
            raise UserError(
                f"{self.names} share no training seed ({sorted(first)} and {sorted(second)}): "
                "train both with the same seeds, so that their differences pair"
            )
        if len(common) < max(len(first), len(second)):
            self.notes.append(
                f"{self.names}: only the {len(common)} training seeds of both were compared"
            )
        return [(seed, seed) for seed in common]

    def _common_units(self, first: Episodes, second: Episodes) -> tuple[np.ndarray, np.ndarray]:
        """Return both runs' means of the units that they have in common, in the same order."""
        common = [key for key in first if key in second]
        units = "evaluation seeds" if self.unit != "prompts" else self.unit
        if not common:
            raise UserError(
                f"{self.names} share no {units.removesuffix('s')}: evaluate both on the same "
                f"{units}, so that their differences pair"
            )
        most = max(len(first), len(second))
        if len(common) < most:
            self.notes.append(
                f"{self.names}: {len(common)} of {most} {units} are common; others left out"
            )
        return _unit_means(first, common), _unit_means(second, common)


def _pairings(
    values: MethodValues, opponents: Sequence[tuple[str, str]], notes: list[str]
) -> Iterator[_Pairing]:
    """Yield the pairs of methods in every setting in which both were evaluated.

    Reference policies have no decoding, so a reference baseline is paired with any decoding.
    """
    for method, baseline in opponents:
        for setting, runs in values.methods[method].items():
            for other, baseline_runs in values.methods[baseline].items():
                if other == setting or (baseline in REFERENCE_POLICIES and other[0] == setting[0]):
                    unit = values.unit_names[setting]
                    yield _Pairing(method, baseline, setting, unit, runs, baseline_runs, notes)


def _differences(
    values: MethodValues, opponents: Sequence[tuple[str, str]], metric: str, notes: list[str]
) -> tuple[list[Difference], list[UserError]]:
    """Return the differences of all pairs with common units, and the errors of the other pairs."""
    paired, errors = [], []
    for pairing in _pairings(values, opponents, notes):
        try:
            paired.append((pairing, pairing.means()))
        except UserError as error:
            errors.append(error)
    differences = []
    for pairing, means in paired:
        several = len(means) > 1
        left, right = np.array([[a.mean(), b.mean()] for a, b in means]).T if several else means[0]
        env, decoding = pairing.setting
        ends, counts = values.ranges[env], pairing.run_counts
        if len(counts) == 2 and min(counts) == 1 < max(counts):
            notes.append(
                f"{pairing.names}: one of them has a single run; its own training noise is not in "
                "the interval"
            )
        difference = compare_means(
            left,
            right,
            method=pairing.method,
            baseline=pairing.baseline,
            unit="training seeds" if several else pairing.unit,
            env=env,
            decoding=decoding,
            metric=metric,
            comparisons=len(paired),
            fewest_runs=min(counts, default=None),
            span=ends[1] - ends[0] if ends else None,
            shared_error=pairing.shared_error() if several and len(counts) < 2 else 0.0,
        )
        differences.append(difference)
    return differences, errors


def _different_settings(runs: Sequence[RunRecord], metric: str) -> list[str]:
    """Return notes on compared runs whose environment or whose rewards behind `metric` differ."""
    compared = {id(item.evaluation) for item in method_evaluations(runs)}
    first: dict[Hashable, tuple[str, object]] = {}
    notes = []
    for run in runs:
        if not any(id(evaluation) in compared for evaluation in run.evaluations):
            continue
        env = run.config.get("env") or {}
        settings = {f"env.kwargs of {env.get('id')}": env.get("kwargs") or {}}
        rewards = {_reward_name(spec): spec for spec in run.config.get("rewards") or []}
        if metric == "score":
            settings["rewards"] = rewards
        elif metric in rewards:  # component values are logged without their weight
            settings[f"reward {metric}"] = {**rewards[metric], "weight": 1}
        for what, value in settings.items():
            # The pipelines of different training seeds have different reward models.
            key = what if what.startswith("env") else (what, training_seed(run))
            name, other = first.setdefault(key, (run.name, value))
            if value != other:
                notes.append(f"not the same task: {name} and {run.name} differ in the {what}")
    return notes


def _general_notes(differences: Sequence[Difference]) -> list[str]:
    notes = []
    if len(differences) > 1:
        notes.append(
            f"{len(differences)} comparisons: a winner needs a sign-flip test with p <= "
            f"{0.05 / len(differences):.2g} (Bonferroni)"
        )
    if any(d.unit != "training seeds" for d in differences):
        notes.append(
            "one training run for each method: this compares two models, not two methods; to "
            f"compare methods, train at least {FEWEST_SEEDS} seeds of each"
        )
    if any(d.coverage_observed is not None and d.coverage_observed < 0.93 for d in differences):
        notes.append(
            "some differences are so skewed that their intervals cover less than 95%: evaluate on "
            "more episodes"
        )
    return notes


def _tables(comparison: Comparison) -> list[str]:
    """Return the markdown tables of the methods and of their differences."""
    estimate = f"{comparison.metric} [95% interval]"
    columns = ["method", "environment", "decoding", estimate, "over", "episodes"]
    rows = [
        [r.method, r.env, r.decoding, format_estimate(r.estimate), _size(r), str(r.episodes)]
        for r in comparison.rows
    ]
    tables = [markdown_table(columns, rows)]
    columns = ["difference", "environment", "decoding", "mean [95% interval]", "pairs", "winner"]
    rows = [
        [
            f"{d.method} - {d.baseline}",
            d.env,
            d.decoding,
            format_estimate(d.estimate),
            _size(d),
            d.winner or "none",
        ]
        for d in comparison.differences
    ]
    return [*tables, markdown_table(columns, rows)] if rows else tables


def _size(row: MethodScore | Difference) -> str:
    return f"{row.estimate.units} {row.unit}"
