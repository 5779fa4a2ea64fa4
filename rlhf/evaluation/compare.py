"""`rlhf compare RUN...`: paired comparison of methods on common evaluation seeds.

Runs whose paths differ only in a part such as `seed3` are runs of one method with different
training seeds. If a method has several training seeds, the seeds are the independent units of the
intervals. If each method has one run, the units are prompts, start states or episodes. The result
then applies only to the models that were evaluated.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.common.names import did_you_mean
from rlhf.common.text import escape_markdown, markdown_table
from rlhf.errors import UserError
from rlhf.evaluation.metrics import UnitName, metric_interval
from rlhf.evaluation.records import REFERENCE_POLICIES, RunRecord, read_runs
from rlhf.evaluation.reward_accuracy import ACCURACY, as_reward_accuracy_runs
from rlhf.evaluation.run_groups import (
    MetricValuesByMethod,
    Setting,
    ValuesByUnit,
    collect_metric_values,
    method_evaluations,
    training_seed,
    unit_means,
)
from rlhf.evaluation.significance import FEWEST_SEEDS, Difference, Unit, compare_means
from rlhf.stats import Interval, interval

MAX_PAIRED_METHODS = 6
"""Maximum number of trained methods for comparisons between all pairs (15 comparisons)."""


@dataclass(frozen=True)
class MethodScore:
    """Mean of the metric for one method in one setting."""

    method: str
    env: str
    decoding: str
    unit: Unit
    """Independent unit of the interval."""
    estimate: Interval
    episodes: int
    """Number of episodes with a value of the metric, of all training seeds together."""


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`."""

    metric: str
    baseline: str
    rows: list[MethodScore]
    """Scores of every method in every setting (environment and decoding)."""
    differences: list[Difference]
    notes: list[str]
    """Caveats, and descriptions of omitted data."""

    def to_markdown(self) -> str:
        """Return Markdown: tables, the results in words, the simulated coverage and notes."""
        parts = _markdown_tables(self)
        parts += [
            f"- {escape_markdown(f'{d.method} against {d.baseline}, {d.env} {d.decoding}')}: "
            f"**{escape_markdown(d.verdict)}**"
            for d in self.differences
        ]
        coverage: dict[str, list[str]] = {}
        several = len({d.baseline for d in self.differences}) > 1
        for d in self.differences:
            name = f"{d.method} - {d.baseline}" if several else d.method
            coverage.setdefault(simulated_coverage_text(d), []).append(name)
        notes = [f"{text} ({', '.join(names)})" for text, names in coverage.items() if text]
        parts += [f"- {escape_markdown(note)}" for note in (*notes, *self.notes)]
        return "\n".join(parts) + "\n"

    def _repr_html_(self) -> str:
        """Return the differences as an HTML table, with the results in words and the notes."""
        head = "".join(f"<th>{name}</th>" for name in ("comparison", "difference", "unit"))
        rows = "".join(
            f"<tr><td>{html.escape(f'{d.method} - {d.baseline} ({d.env}, {d.decoding})')}</td>"
            f"<td>{html.escape(format_estimate(d.estimate))}</td><td>{html.escape(d.unit)}</td></tr>"
            for d in self.differences
        )
        texts = [*(d.verdict for d in self.differences), *self.notes]
        items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f"<p>{html.escape(self.metric)}</p>{table}<ul>{items}</ul>"

    def to_json(self) -> str:
        """Return the comparison as JSON text; unknown bounds of intervals are null."""
        tree = asdict(self)
        items = [*tree["rows"], *tree["differences"]]
        for item, source in zip(items, [*self.rows, *self.differences], strict=True):
            item["estimate"] = source.estimate.as_dict()
        return json.dumps(tree, indent=2, ensure_ascii=False)


def compare(
    run_dirs: Sequence[str | Path], *, metric: str | None = None, baseline: str | None = None
) -> Comparison:
    """Compare the methods of run or pipeline directories on common prompts or evaluation seeds.

    Args:
        run_dirs: Run or pipeline directories.
        metric: Name of an episode field (return, success, cost, ...) or of a reward component, or
            "normalized". The normalized return is 0 for the random policy and 1 for the optimal
            policy. The default is `ACCURACY` if the runs are those of rewards, otherwise the result
            of `default_metric`.
        baseline: Name of the method with which the other methods are compared, by default the first
            trained method. If `baseline` is None and there is only one directory, the trained
            methods are also compared with each other, if there are at most `MAX_PAIRED_METHODS`.

    Raises:
        UserError: A directory contains no runs or is given twice, no episodes were evaluated, a
            name is unknown, the default metric cannot be determined, or methods were evaluated in
            the same setting, but have no training seeds or no units in common.
    """
    directories = [Path(os.path.realpath(directory)) for directory in run_dirs]
    every_pair = baseline is None and len(directories) == 1
    if twice := [str(path) for path in directories if directories.count(path) > 1]:
        raise UserError(f"{twice[0]} is given twice: a run cannot be compared with itself")
    stages = [read_runs(directory) for directory in directories]
    if rewards := as_reward_accuracy_runs(list(chain(*stages))):
        comparison = compare_runs(
            rewards.runs, metric=metric or ACCURACY, baseline=baseline, every_pair=every_pair
        )
        return replace(comparison, notes=[*comparison.notes, *rewards.notes])
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
    """Compare the methods of run records in memory, as `compare` does for directories.

    Args:
        runs: Run records.
        metric: See `compare`.
        baseline: See `compare`.
        every_pair: Whether to compare all pairs of trained methods, if there are at most
            `MAX_PAIRED_METHODS` of them.
        keep_going: Whether to return a comparison without differences if no two methods can be
            paired, and to use "return" if `default_metric` finds no other metric, instead of
            raising an error. If only some pairs of methods cannot be paired, a note is added in any
            case.

    Raises:
        UserError: See `compare`.
    """
    is_default = metric is None
    metric = metric or default_metric(runs, strict=not keep_going)
    values = collect_metric_values(runs, metric)
    methods, notes = values.methods, list(values.notes)
    if is_default and metric != "return":
        notes.append(
            f"compared by {metric}, because every return is 0; --metric chooses another metric"
        )
    if baseline is None:
        trained = [name for name in methods if name not in values.untrained_methods]
        baseline = next(iter([*trained, *methods]), None)
    if not methods:
        raise _no_methods_error(runs, metric, notes)
    if baseline not in methods:
        raise UserError(
            f"baseline: no method named {baseline!r} was evaluated ({', '.join(methods)})"
            f"{did_you_mean(str(baseline), methods)}{''.join(f'; {note}' for note in values.notes)}"
        )
    rows = [
        _method_score(name, setting, seeds, metric, values)
        for name, method in methods.items()
        for setting, seeds in method.items()
    ]
    method_pairs = _pairs_to_compare(
        methods, baseline, untrained_methods=values.untrained_methods, every_pair=every_pair
    )
    differences, errors = _compare_pairs(values, method_pairs, metric, notes)
    if errors and not differences and not keep_going:
        raise errors[0]
    notes += [f"not compared: {error}" for error in errors]
    notes += _general_notes(differences)
    notes += _notes_on_different_settings(runs, metric)
    if not differences and not errors:
        others = "no other method was evaluated in the same environment and with the same decoding"
        notes.append(f"nothing was compared: {others} as {baseline}")
    return Comparison(metric, baseline, rows, differences, list(dict.fromkeys(notes)))


def _no_methods_error(runs: Sequence[RunRecord], metric: str, notes: Sequence[str]) -> UserError:
    """Return the error for run records without a score for the metric."""
    if any(evaluation.episodes for run in runs for evaluation in run.evaluations):
        return UserError(f"no episode has a score for {metric}: {'; '.join(notes)}")
    return UserError(
        "no episodes were evaluated in these directories: first run `rlhf evaluate` with the key "
        "env (results on text, labels or tasks are in the report; rewards need the scores of pairs "
        "that rlhf reward and rlhf reward-report write)"
    )


def _pairs_to_compare(
    methods: Mapping[str, object],
    baseline: str,
    *,
    untrained_methods: Container[str],
    every_pair: bool,
) -> list[tuple[str, str]]:
    """Return the pairs (method, baseline) to compare.

    Every other method is compared with `baseline`. If `every_pair` is set and there are at most
    `MAX_PAIRED_METHODS` trained methods, the other pairs of trained methods follow.
    """
    pairs = [(name, baseline) for name in methods if name != baseline]
    trained = [name for name in methods if name not in untrained_methods and name != baseline]
    if every_pair and len(trained) < MAX_PAIRED_METHODS:
        pairs += [(later, earlier) for earlier, later in combinations(trained, 2)]
    return pairs


def simulated_coverage_text(difference: Difference) -> str:
    """Return a text on the simulated coverage of a difference; "" if it was not simulated."""
    shares = {
        "for normally distributed differences": difference.coverage_normal,
        "for resampled observed differences": difference.coverage_observed,
    }
    parts = [f"{share:.1%} {what}" for what, share in shares.items() if share is not None]
    if not parts:
        return ""
    size = f"{difference.estimate.units} {difference.unit}"
    return f"simulated coverage of the 95% intervals with {size}: {', '.join(parts)}"


def format_estimate(estimate: Interval, number_format: str = ".3f") -> str:
    """Return text such as `0.412 [0.380, 0.444]`; without an interval, the value and the reason."""
    value, low, high = (
        format(number, number_format) for number in (estimate.value, estimate.low, estimate.high)
    )
    if not estimate.known:
        return f"{value} (no interval: {estimate.needs or f'n = {estimate.units}'})"
    return f"{value} [{low}, {high}]"


def default_metric(runs: Sequence[RunRecord], *, strict: bool = True) -> str:
    """Return "return", or the result of `headline_metric` if every return is 0.

    With a prompt dataset, every return is 0, because there is no environment reward.

    Raises:
        UserError: `strict` is set, every return is 0, and no reward has scores in all runs.
    """
    rows = _compared_episodes(runs)
    if any(row.get("return") for row in rows):
        return "return"
    metric = headline_metric(runs) or "return"
    if strict and metric == "return" and any(row.get("components") for row in rows):
        raise UserError(
            "every return is 0 and no reward has scores in all of these runs: evaluate them with "
            "the same rewards, or choose a metric with --metric"
        )
    return metric


def _compared_episodes(runs: Sequence[RunRecord]) -> list[Mapping[str, Any]]:
    """Return the episodes of the evaluations that are compared.

    An evaluation that another one replaces is omitted: it may have other rewards.
    """
    return [row for item in method_evaluations(runs) for row in item.evaluation.episodes]


def headline_metric(runs: Sequence[RunRecord]) -> str | None:
    """Return the name of the main metric of a report, or None if no episodes were evaluated.

    The metric is the first component, in the order of names, whose name begins with "gold", that
    all episodes have and that no run was trained on. Otherwise, it is "return" if a return is not
    0, or if the episodes have no common component. If every return is 0, as for a prompt dataset,
    it is the first common component of this list: "score", the weighted sum of several training
    rewards; the training rewards; other components, those of the key `gold` last.
    """
    rows = _compared_episodes(runs)
    if not rows:
        return None
    scored = [
        {name for name, value in (row.get("components") or {}).items() if value is not None}
        for row in rows
    ]
    common = set.intersection(*({*(row.get("components") or {})} for row in rows))
    common &= set.union(*scored)
    # A reward that a run is trained on is not a gold score, whatever its name.
    targets = {
        name
        for run in runs
        if "policies" not in run.config
        for name in _reward_names(run, "rewards")
    }
    gold = sorted(name for name in common - targets if name.startswith("gold"))
    if gold:
        return gold[0]
    if not common or any(row.get("return") for row in rows):
        return "return"
    trained = ["score", *(name for run in runs for name in _reward_names(run, "rewards"))]
    monitored = {name for run in runs for name in _reward_names(run, "gold")}
    named = [name for name in trained if name in common]
    return next(iter([*named, *sorted(common - monitored), *sorted(common)]))


def _reward_names(run: RunRecord, key: str) -> list[str]:
    """Return the component names of the rewards listed under `key` in a run's configuration."""
    return [_reward_name(spec) for spec in run.config.get(key) or [] if isinstance(spec, Mapping)]


def _reward_name(spec: Mapping[str, object]) -> str:
    """Return a reward's component name: its `name`, else its function's name, else its kind."""
    kind = spec.get("kind")
    default = str(spec.get("path")).rpartition(":")[2] if kind == "function" else kind
    return str(spec.get("name") or default)


def _method_score(
    method: str,
    setting: Setting,
    values_by_seed: Mapping[int, ValuesByUnit],
    metric: str,
    values: MetricValuesByMethod,
) -> MethodScore:
    """Return the mean of the metric for one method in one setting.

    `values_by_seed` maps each training seed of the method to its values in this setting.
    """
    env = setting[0]
    samples = [pair for units in values_by_seed.values() for pair in units.items()]
    column = [value for _, unit_values in samples for value in unit_values]
    if len(values_by_seed) > 1:
        means = [float(unit_means(units, units).mean()) for units in values_by_seed.values()]
        unit, estimate = (
            "training seeds",
            interval(means, kind="mean", bounds=values.binary_values_by_env[env]),
        )
    else:
        labels = [unit for unit, unit_values in samples for _ in unit_values]
        unit = values.unit_names[setting]
        estimate = metric_interval(metric, column, labels, values.limits[method, setting])
    return MethodScore(method, *setting, unit, estimate, len(column))


@dataclass(frozen=True)
class _PairedMethodRuns:
    """Training runs of a method in one setting, and of its baseline."""

    method: str
    baseline: str
    setting: Setting
    unit: UnitName
    runs: Mapping[int, ValuesByUnit]
    """Training seed -> values of the method."""
    baseline_runs: Mapping[int, ValuesByUnit]
    """Training seed -> values of the baseline."""
    untrained_methods: Container[str]
    """Methods that are not trained."""
    notes: list[str]
    """List to which notes on omitted data are added."""

    @property
    def names(self) -> str:
        """Text "METHOD and BASELINE" for messages."""
        return f"{self.method} and {self.baseline}"

    def paired_unit_means(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the unit means of the method and of the baseline, for each pair of runs.

        Notes on omitted training seeds and units are added to `notes`.

        Returns:
            For each pair of runs, two arrays [units] in the order of the common units.

        Raises:
            UserError: The method and the baseline have no common training seeds or units.
        """
        return [
            self._common_unit_means(self.runs[seed], self.baseline_runs[other])
            for seed, other in self._seed_pairs()
        ]

    @property
    def trained_run_counts(self) -> list[int]:
        """Number of training runs of each of the two methods that is trained."""
        runs_of = {self.method: self.runs, self.baseline: self.baseline_runs}
        return [len(runs) for name, runs in runs_of.items() if name not in self.untrained_methods]

    def mean_unit_differences(self) -> np.ndarray:
        """Return the difference of each unit, averaged over the training seeds, [units].

        All training seeds are compared with the same evaluation of the reference policy, so their
        differences have the error of the mean over these units in common. If the runs have no
        common unit, the result is a single 0.
        """
        runs = [*self.runs.values(), *self.baseline_runs.values()]
        common = [unit for unit in runs[0] if all(unit in run for run in runs)]
        if not common:
            return np.zeros(1)
        first, second = (
            np.mean([unit_means(run, common) for run in side.values()], axis=0)
            for side in (self.runs, self.baseline_runs)
        )
        return first - second

    def _seed_pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of training seeds (method, baseline) to compare.

        Runs with equal seeds are paired. If the method or the baseline has a single run, this run
        is paired with every run of the other method.

        Raises:
            UserError: There are no common seeds.
        """
        first, second = self.runs, self.baseline_runs
        common = sorted(first.keys() & second.keys())
        if len(first) == 1 or len(second) == 1:
            return [(a, b) for a in sorted(first) for b in sorted(second)]
        if not common:
            raise UserError(
                f"{self.names} share no training seed ({sorted(first)} and {sorted(second)}): "
                "train both methods with the same seeds, so that runs can be paired"
            )
        if len(common) < max(len(first), len(second)):
            self.notes.append(
                f"{self.names}: only the {len(common)} common training seeds were compared"
            )
        return [(seed, seed) for seed in common]

    def _common_unit_means(
        self, first: ValuesByUnit, second: ValuesByUnit
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the means of two runs on each of their common units.

        Returns:
            Two arrays [units], in the same order of units.

        Raises:
            UserError: The runs have no common units.
        """
        common = [key for key in first if key in second]
        units = "evaluation seeds" if self.unit != "prompts" else self.unit
        if not common:
            raise UserError(
                f"{self.names} share no {units.removesuffix('s')}: evaluate both methods on the "
                f"same {units}, so that results can be paired"
            )
        most = max(len(first), len(second))
        if len(common) < most:
            self.notes.append(
                f"{self.names}: only {len(common)} of {most} {units} are common and were compared"
            )
        return unit_means(first, common), unit_means(second, common)


def _method_pairings(
    values: MetricValuesByMethod, method_pairs: Sequence[tuple[str, str]], notes: list[str]
) -> Iterator[_PairedMethodRuns]:
    """Yield every pair of methods in every setting in which both methods were evaluated.

    The random and the expert policy are evaluated without decoding. As a baseline, they are
    therefore paired with every decoding of a method in the same environment.
    """
    for method, baseline in method_pairs:
        for setting, runs in values.methods[method].items():
            for other, baseline_runs in values.methods[baseline].items():
                without_decoding = baseline in REFERENCE_POLICIES
                if other == setting or (without_decoding and other[0] == setting[0]):
                    unit = values.unit_names[setting]
                    yield _PairedMethodRuns(
                        method,
                        baseline,
                        setting,
                        unit,
                        runs,
                        baseline_runs,
                        values.untrained_methods,
                        notes,
                    )


def _compare_pairs(
    values: MetricValuesByMethod,
    method_pairs: Sequence[tuple[str, str]],
    metric: str,
    notes: list[str],
) -> tuple[list[Difference], list[UserError]]:
    """Return the differences of all pairs that can be compared, and errors for the other pairs.

    Pairs need common training seeds and common units. Notes on omitted data are added to `notes`.
    """
    paired, errors = [], []
    for pairing in _method_pairings(values, method_pairs, notes):
        try:
            paired.append((pairing, pairing.paired_unit_means()))
        except UserError as error:
            errors.append(error)
    differences = []
    for pairing, means in paired:
        several = len(means) > 1
        left, right = np.array([[a.mean(), b.mean()] for a, b in means]).T if several else means[0]
        env, decoding = pairing.setting
        ends, counts = values.binary_values_by_env[env], pairing.trained_run_counts
        if len(counts) == 2 and min(counts) == 1 < max(counts):
            notes.append(
                f"{pairing.names}: one of the two methods has a single run, so the interval does "
                "not include the variation of this method between training seeds"
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
            shared_differences=pairing.mean_unit_differences()
            if several and len(counts) < 2
            else None,
        )
        differences.append(difference)
    return differences, errors


def _notes_on_different_settings(runs: Sequence[RunRecord], metric: str) -> list[str]:
    """Return notes on compared runs whose environment options, or rewards of `metric`, differ."""
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
        elif metric in rewards:  # the weight does not matter, because components are not weighted
            settings[f"reward {metric}"] = {**rewards[metric], "weight": 1}
        for what, value in settings.items():
            # Rewards are compared only within a training seed, because the pipelines of different
            # training seeds have different reward models.
            key = what if what.startswith("env") else (what, training_seed(run))
            name, other = first.setdefault(key, (run.name, value))
            if value != other:
                notes.append(f"not the same task: {name} and {run.name} differ in {what}")
    return notes


def _general_notes(differences: Sequence[Difference]) -> list[str]:
    """Return caveats on multiple comparisons, on single training runs and on low coverage."""
    notes = []
    if len(differences) > 1:
        notes.append(
            f"{len(differences)} comparisons: the significance level of each test is "
            f"{0.05 / len(differences):.2g} (Bonferroni)"
        )
    if any(d.unit != "training seeds" for d in differences):
        notes.append(
            "one training run for each method: the result applies to these models, not to the "
            f"methods; to compare methods, train each with at least {FEWEST_SEEDS} seeds"
        )
    if any(d.coverage_observed is not None and d.coverage_observed < 0.93 for d in differences):
        notes.append(
            "some differences are so skewed that the simulated coverage of their 95% intervals is "
            "below 93%: evaluate more episodes, or train with more seeds"
        )
    return notes


def _markdown_tables(comparison: Comparison) -> list[str]:
    """Return the Markdown table of the methods, and that of the differences if there are any."""
    estimate = f"{comparison.metric} [95% interval]"
    columns = ["method", "environment", "decoding", estimate, "over", "episodes"]
    rows = [
        [
            r.method,
            r.env,
            r.decoding,
            format_estimate(r.estimate),
            _sample_size_text(r),
            str(r.episodes),
        ]
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
            _sample_size_text(d),
            d.winner or "none",
        ]
        for d in comparison.differences
    ]
    return [*tables, markdown_table(columns, rows)] if rows else tables


def _sample_size_text(row: MethodScore | Difference) -> str:
    """Return the number and the name of the independent units, such as "5 training seeds"."""
    return f"{row.estimate.units} {row.unit}"
