"""`rlhf compare RUN...`: paired comparison of methods on common evaluation seeds.

Runs whose paths differ only in a part such as `seed3` are training seeds of one method. With
several training seeds the intervals are over training seeds. With one run of each method they are
over episodes, and the result holds for these two models only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from rlhf.common.names import nearest
from rlhf.errors import UserError
from rlhf.evaluation.metrics import metric_interval
from rlhf.evaluation.records import REFERENCE_POLICIES, RunRecord, read_stages
from rlhf.evaluation.run_groups import Episodes, MethodValues, Setting, collect_methods
from rlhf.evaluation.significance import FEWEST_SEEDS, Difference, Unit, compare_means
from rlhf.stats import Interval, interval

NamedRuns = tuple[str, Mapping[int, Episodes]]
"""Name of a method, and its episodes by training seed."""

MOST_PAIRED = 6
"""Largest number of trained methods that are all compared with each other: 15 comparisons."""


@dataclass(frozen=True)
class MethodScore:
    """Mean of one method in one setting."""

    method: str
    env: str
    decoding: str
    unit: Unit
    estimate: Interval
    episodes: int


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`; `notes` list what was left out and the caveats."""

    metric: str
    baseline: str
    rows: list[MethodScore]
    differences: list[Difference]
    notes: list[str]

    def to_markdown(self) -> str:
        """Two tables, the verdicts, the measured coverage and the notes."""
        parts = [_rows_markdown(self), _differences_markdown(self)]
        parts += [
            f"- {d.method} against {d.baseline}, {d.env} {d.decoding}: **{d.verdict}**"
            for d in self.differences
        ]
        coverage: dict[str, list[str]] = {}
        several = len({d.baseline for d in self.differences}) > 1
        for d in self.differences:
            name = f"{d.method} - {d.baseline}" if several else d.method
            coverage.setdefault(coverage_words(d), []).append(name)
        parts += [f"- {text} ({', '.join(names)})" for text, names in coverage.items() if text]
        parts += [f"- {note}" for note in self.notes]
        return "\n".join(parts) + "\n"

    def to_json(self) -> str:
        """Everything as JSON text; unknown interval ends are null."""
        tree = asdict(self)
        for items, objects in ((tree["rows"], self.rows), (tree["differences"], self.differences)):
            for item, source in zip(items, objects, strict=True):
                item["estimate"] = source.estimate.as_dict()
        return json.dumps(tree, indent=2, ensure_ascii=False)


def compare(
    run_dirs: Sequence[str | Path], *, metric: str | None = None, baseline: str | None = None
) -> Comparison:
    """Compare run or pipeline directories on the prompts or evaluation seeds they share.

    Args:
        run_dirs: run or pipeline directories.
        metric: an episode field (return, success, cost, ...), a reward component, or normalized (0
            for the random policy, 1 for the optimal one, if the environment knows both); by default
            the result of `default_metric`.
        baseline: the method that others are compared with, by default the first. Without it the
            trained policies of a single pipeline are also compared with each other.

    Raises:
        UserError: nothing was evaluated, a name is unknown, or nothing is shared.
    """
    directories = [Path(directory).resolve() for directory in run_dirs]
    every_pair = baseline is None and len(directories) == 1
    if twice := [str(path) for path in directories if directories.count(path) > 1]:
        raise UserError(f"{twice[0]} is given twice: a run cannot be compared with itself")
    runs = [run for directory in directories for run in read_stages(directory)]
    return compare_runs(runs, metric=metric, baseline=baseline, every_pair=every_pair)


def compare_runs(
    runs: Sequence[RunRecord],
    *,
    metric: str | None = None,
    baseline: str | None = None,
    every_pair: bool = False,
    keep_going: bool = False,
) -> Comparison:
    """`compare` for runs that are already read.

    Args:
        runs: the runs.
        metric: see `compare`.
        baseline: see `compare`.
        every_pair: also compare up to `MOST_PAIRED` trained methods with each other.
        keep_going: return a result without differences if no two methods share a unit, instead of
            raising an error. Single pairs that share no unit are always reported as notes.
    """
    is_default = metric is None
    metric = metric or default_metric(runs)
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
            f"{nearest(str(baseline), methods)}"
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
    if not differences and not errors:
        notes.append(
            f"nothing was compared: no other method was evaluated as {baseline} was, in the same "
            "environment with the same decoding"
        )
    return Comparison(metric, baseline, rows, differences, list(dict.fromkeys(notes)))


def _opponents(
    methods: Mapping[str, object], baseline: str, *, every_pair: bool
) -> list[tuple[str, str]]:
    """Pairs to compare: every method with the baseline, then trained methods with each other."""
    pairs = [(name, baseline) for name in methods if name != baseline]
    trained = [name for name in methods if name not in REFERENCE_POLICIES and name != baseline]
    if every_pair and len(trained) < MOST_PAIRED:
        pairs += [(later, earlier) for earlier, later in combinations(trained, 2)]
    return pairs


def _comparable(setting: Setting, baseline: str, baseline_setting: Setting) -> bool:
    """Whether two settings may be compared.

    Reference policies do not decode, so that a reference baseline matches any decoding.
    """
    env, decoding = setting
    other_env, other_decoding = baseline_setting
    return env == other_env and (decoding == other_decoding or baseline in REFERENCE_POLICIES)


def coverage_words(difference: Difference) -> str:
    """Simulated coverage of the interval of a difference, in words; "" without an interval."""
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
    """`0.412 [0.380, 0.444]`, or the value and the reason why there is no interval."""
    if not estimate.known:
        reason = estimate.needs or f"n = {estimate.units}"
        return f"{estimate.value:.3f} (no interval: {reason})"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def default_metric(runs: Sequence[RunRecord]) -> str:
    """The environment's return; if every return is 0, as with prompt sets, `headline_metric`."""
    rows = (row for run in runs for e in run.evaluations for row in e.episodes)
    if any(row.get("return") for row in rows):
        return "return"
    return headline_metric(runs) or "return"


def headline_metric(runs: Sequence[RunRecord]) -> str | None:
    """Leading metric of a report: a gold component, else the return, else the training reward.

    A prompt set has no reward of its own (every return is 0). There the reward that the runs were
    trained on leads, or "score" if it has several components.

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
    """Names of the rewards in a run's configuration."""
    specs = run.config.get(key) or []
    return [str(s.get("name") or s.get("kind")) for s in specs if isinstance(s, Mapping)]


def _method_score(
    method: str,
    setting: Setting,
    seeds: Mapping[int, Episodes],
    metric: str,
    values: MethodValues,
) -> MethodScore:
    episodes = values.episodes[method, setting]
    if len(seeds) > 1:
        means = [float(unit_means(units).mean()) for units in seeds.values()]
        estimate = interval(means, kind="mean", bounds=values.ranges[setting[0]])
        return MethodScore(method, *setting, "training seeds", estimate, episodes)
    units = next(iter(seeds.values()))
    column = [value for unit_values in units.values() for value in unit_values]
    labels = [unit for unit, unit_values in units.items() for _ in unit_values]
    estimate = metric_interval(metric, column, labels, values.limits[setting[0]])
    return MethodScore(method, *setting, _unit(values.unit_names[setting]), estimate, episodes)


def unit_means(episodes: Episodes) -> np.ndarray:
    """Mean over the episodes of each unit. [units]"""
    return np.array([np.mean(values) for values in episodes.values()])


def _unit(name: str) -> Unit:
    return name  # type: ignore[return-value]


def _differences(
    values: MethodValues, opponents: Sequence[tuple[str, str]], metric: str, notes: list[str]
) -> tuple[list[Difference], list[UserError]]:
    """Differences of all pairs that share units, and errors of the pairs that do not."""
    methods = values.methods
    paired, errors = [], []
    for name, baseline in opponents:
        for setting in methods[name]:
            for baseline_setting in methods[baseline]:
                if not _comparable(setting, baseline, baseline_setting):
                    continue
                first = name, methods[name][setting]
                second = baseline, methods[baseline][baseline_setting]
                try:
                    pairs = _pairs(first, second, values.unit_names[setting], notes)
                except UserError as error:
                    errors.append(error)
                else:
                    paired.append((first, second, setting, pairs))
    differences = [
        _difference(*arguments, metric=metric, values=values, comparisons=len(paired))
        for arguments in paired
    ]
    return differences, errors


def _pairs(
    first: NamedRuns, second: NamedRuns, unit: str, notes: list[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Unit means of every two training runs that are paired, on their common units.

    Raises:
        UserError: nothing is shared.
    """
    (method, runs), (baseline, base) = first, second
    names = f"{method} and {baseline}"
    pairs = [
        _common_units(runs[a], base[b], names, unit, notes)
        for a, b in _pair_seeds(runs, base, names, notes)
    ]
    trained = _trained_counts(first, second)
    if len(trained) == 2 and min(trained) == 1 < max(trained):
        notes.append(
            f"{names}: one side is a single run; its own training noise is not in the interval"
        )
    return pairs


def _trained_counts(*sides: NamedRuns) -> list[int]:
    """Number of training runs of each side that is not a reference policy."""
    return [len(runs) for name, runs in sides if name not in REFERENCE_POLICIES]


def _difference(
    first: NamedRuns,
    second: NamedRuns,
    setting: Setting,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    metric: str,
    values: MethodValues,
    comparisons: int,
) -> Difference:
    unit: Unit = "training seeds" if len(pairs) > 1 else _unit(values.unit_names[setting])
    if len(pairs) > 1:
        left, right = (np.array([p[side].mean() for p in pairs]) for side in (0, 1))
    else:
        left, right = pairs[0]
    ends = values.ranges[setting[0]]
    return compare_means(
        left,
        right,
        method=first[0],
        baseline=second[0],
        unit=unit,
        env=setting[0],
        decoding=setting[1],
        metric=metric,
        comparisons=comparisons,
        fewest_runs=min(_trained_counts(first, second), default=len(pairs)),
        span=ends[1] - ends[0] if ends else None,
    )


def _pair_seeds(
    runs: Mapping[int, Episodes], base: Mapping[int, Episodes], names: str, notes: list[str]
) -> list[tuple[int, int]]:
    """Training seeds that are paired; a single run is paired with every run of the other side."""
    common = sorted(runs.keys() & base.keys())
    if len(runs) == 1 or len(base) == 1:
        return [(a, b) for a in sorted(runs) for b in sorted(base)]
    if not common:
        raise UserError(
            f"{names} share no training seed ({sorted(runs)} and {sorted(base)}): train both with "
            "the same seeds, so that their differences pair"
        )
    if len(common) < max(len(runs), len(base)):
        notes.append(f"{names}: only the {len(common)} training seeds of both were compared")
    return [(seed, seed) for seed in common]


def _common_units(
    first: Episodes, second: Episodes, names: str, unit: str, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Means of the units that both sides have, in the same order."""
    units = [unit for unit in first if unit in second]
    what = "evaluation seeds" if unit != "prompts" else unit
    if not units:
        raise UserError(
            f"{names} share no {what.removesuffix('s')}: evaluate both on the same {what}, so that "
            "their differences pair"
        )
    most = max(len(first), len(second))
    if len(units) < most:
        notes.append(f"{names}: {len(units)} of {most} {what} are common; others left out")
    return (
        np.array([np.mean(first[key]) for key in units]),
        np.array([np.mean(second[key]) for key in units]),
    )


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


def _rows_markdown(comparison: Comparison) -> str:
    lines = [
        f"| method | environment | decoding | {comparison.metric} [95% interval] | over "
        "| episodes |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.method} | {r.env} | {r.decoding} | {format_estimate(r.estimate)} "
        f"| {r.estimate.units} {r.unit} | {r.episodes} |"
        for r in comparison.rows
    ]
    return "\n".join(lines) + "\n"


def _differences_markdown(comparison: Comparison) -> str:
    lines = [
        "| difference | environment | decoding | mean [95% interval] | pairs | winner |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {d.method} - {d.baseline} | {d.env} | {d.decoding} | {format_estimate(d.estimate)} "
        f"| {d.estimate.units} {d.unit} | {d.winner or 'none'} |"
        for d in comparison.differences
    ]
    return "\n".join(lines) + "\n" if comparison.differences else ""
