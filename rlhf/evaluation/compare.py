"""`rlhf compare RUN...`: arms on common evaluation seeds, with intervals and a careful verdict.

An arm is a method. Runs whose paths differ only in a part such as `seed3` are training seeds of one
arm, and the interval is over training seeds; with one run an arm it is over episodes and speaks
of these two models only.
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
from rlhf.evaluation.run_groups import Collected, Episodes, Setting, collect_arms
from rlhf.evaluation.verdict import FEWEST_SEEDS, Difference, Unit, judge
from rlhf.stats import Interval, interval

Side = tuple[str, Mapping[int, Episodes]]
"""Arm, and its episodes by training seed."""

MOST_PAIRED = 6
"""Trained arms up to which each is compared with each: 15 comparisons."""


@dataclass(frozen=True)
class Row:
    """One arm in one setting."""

    arm: str
    env: str
    decoding: str
    unit: Unit
    estimate: Interval
    episodes: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `notes` say what was left out and what the numbers cannot tell."""

    metric: str
    baseline: str
    rows: list[Row]
    differences: list[Difference]
    notes: list[str]

    def to_markdown(self) -> str:
        """Two tables, the verdicts, the measured coverage and the notes."""
        parts = [_rows_markdown(self), _differences_markdown(self)]
        parts += [
            f"- {d.arm} against {d.baseline}, {d.env} {d.decoding}: **{d.verdict}**"
            for d in self.differences
        ]
        coverage: dict[str, list[str]] = {}
        several = len({d.baseline for d in self.differences}) > 1
        for d in self.differences:
            name = f"{d.arm} - {d.baseline}" if several else d.arm
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

    `metric` is an episode field (return, success, cost, ...), a reward component, or normalized (0
    for the random policy, 1 for the optimal one, where the environment knows both); by default it
    is the one that `default_metric` finds. `baseline` names the arm that others are compared with,
    by default the first; without it the trained policies of a single pipeline are compared with
    each other too. Raises UserError (a ValueError) when nothing was evaluated, a name is
    unknown or nothing is shared.
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
    """`compare` for runs already read.

    With `every_pair` up to `MOST_PAIRED` trained arms are compared with each other too, not with
    the baseline alone. Arms that share no unit are noted; where no two share one, that is an error
    unless it shall `keep_going`.
    """
    chosen = metric is None
    metric = metric or default_metric(runs)
    collected = collect_arms(runs, metric)
    arms, notes = collected.arms, list(collected.notes)
    if chosen and metric != "return":
        notes.append(f"judged by {metric}, as every return is 0; --metric names another")
    if baseline is None:
        trained = [name for name in arms if name not in REFERENCE_POLICIES]
        baseline = next(iter([*trained, *arms]), None)
    if not arms and any(e.episodes for run in runs for e in run.evaluations):
        raise UserError(f"no episode has a score of {metric}: {'; '.join(notes)}")
    if not arms:
        raise UserError(
            "no episodes were evaluated in these directories: run `rlhf evaluate` with env first "
            "(what was measured on text, labels, tasks or pairs stands in the report)"
        )
    if baseline not in arms:
        raise UserError(
            f"no evaluated arm named {baseline!r} ({', '.join(arms)}){nearest(str(baseline), arms)}"
        )
    rows = [
        _row(name, setting, found, metric, collected)
        for name, arm in arms.items()
        for setting, found in arm.items()
    ]
    opponents = _opponents(arms, baseline, every_pair=every_pair)
    differences, apart = _differences(collected, opponents, metric, notes)
    if apart and not differences and not keep_going:
        raise apart[0]
    notes += [f"not compared: {error}" for error in apart]
    notes += _general_notes(differences)
    if not differences and not apart:
        notes.append(
            f"nothing was compared: no other arm was evaluated as {baseline} was, in the same "
            "environment with the same decoding"
        )
    return Comparison(metric, baseline, rows, differences, list(dict.fromkeys(notes)))


def _opponents(
    arms: Mapping[str, object], baseline: str, *, every_pair: bool
) -> list[tuple[str, str]]:
    """(arm, what it is compared with): the baseline first, then trained arms with earlier ones."""
    found = [(name, baseline) for name in arms if name != baseline]
    trained = [name for name in arms if name not in REFERENCE_POLICIES and name != baseline]
    if every_pair and len(trained) < MOST_PAIRED:
        found += [(later, earlier) for earlier, later in combinations(trained, 2)]
    return found


def _meet(arm: tuple[str, Setting], baseline: tuple[str, Setting]) -> bool:
    """Whether two arms are compared in these settings.

    A baseline that nobody trained, such as random, decodes nothing: it meets every decoding.
    """
    (_, (env, decoding)), (name, (other_env, other_decoding)) = arm, baseline
    return env == other_env and (decoding == other_decoding or name in REFERENCE_POLICIES)


def coverage_words(difference: Difference) -> str:
    """How often intervals like this one contain the truth, by simulation; "" without interval."""
    n, unit = difference.estimate.n, difference.unit
    shares = {
        "for normal differences": difference.coverage_normal,
        "redrawing the observed ones": difference.coverage_observed,
    }
    told = [f"{share:.1%} {what}" for what, share in shares.items() if share is not None]
    return (
        f"measured coverage of the 95% intervals at {n} {unit}: {', '.join(told)}" if told else ""
    )


def format_estimate(estimate: Interval) -> str:
    """`0.412 [0.380, 0.444]`, or the bare value where there is no interval."""
    if not estimate.known:
        return f"{estimate.value:.3f} (no interval: {estimate.needs or f'n = {estimate.n}'})"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def default_metric(runs: Sequence[RunRecord]) -> str:
    """The environment's own return; where every one is 0, as on prompts, the page's headline."""
    rows = (row for run in runs for e in run.evaluations for row in e.episodes)
    if any(row.get("return") for row in rows):
        return "return"
    return headline_metric(runs) or "return"


def headline_metric(runs: Sequence[RunRecord]) -> str | None:
    """The metric that leads a page: a gold component, else the return, else what was trained on.

    None when nothing was evaluated by episodes. A prompt set has no reward of its own (every return
    is 0): there the reward that the runs were trained on leads, "score" where it has several parts.
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
    trained = ["score", *(name for run in runs for name in _rewards(run, "rewards"))]
    measured_only = {name for run in runs for name in _rewards(run, "gold")}
    named = [name for name in trained if name in common]
    return next(iter([*named, *sorted(common - measured_only), *sorted(common)]))


def _rewards(run: RunRecord, key: str) -> list[str]:
    """Names of the rewards that a run's configuration lists."""
    specs = run.config.get(key) or []
    return [str(s.get("name") or s.get("kind")) for s in specs if isinstance(s, Mapping)]


def _row(
    arm: str, setting: Setting, runs: Mapping[int, Episodes], metric: str, collected: Collected
) -> Row:
    episodes = collected.episodes[arm, setting]
    if len(runs) > 1:
        means = [float(unit_values(found).mean()) for found in runs.values()]
        kept = interval(means, kind="mean", bounds=collected.ranges[setting[0]])
        return Row(arm, *setting, "training seeds", kept, episodes)
    found = next(iter(runs.values()))
    values = [value for some in found.values() for value in some]
    labels = [unit for unit, some in found.items() for _ in some]
    limits = collected.limits[setting[0]]
    estimate = metric_interval(metric, values, labels, limits)
    return Row(arm, *setting, _unit(collected.names[setting]), estimate, episodes)


def unit_values(episodes: Episodes) -> np.ndarray:
    """The mean of each unit's episodes. [units]"""
    return np.array([np.mean(values) for values in episodes.values()])


def _unit(name: str) -> Unit:
    return name  # type: ignore[return-value]


def _differences(
    collected: Collected, opponents: Sequence[tuple[str, str]], metric: str, notes: list[str]
) -> tuple[list[Difference], list[UserError]]:
    """What can be paired, judged together; and why the rest cannot."""
    arms = collected.arms
    paired, apart = [], []
    for name, other in opponents:
        for setting in arms[name]:
            for against in arms[other]:
                if not _meet((name, setting), (other, against)):
                    continue
                first, second = (name, arms[name][setting]), (other, arms[other][against])
                try:
                    found = _pairs(first, second, collected.names[setting], notes)
                except UserError as error:
                    apart.append(error)
                else:
                    paired.append((first, second, setting, found))
    differences = [
        _difference(*found, metric=metric, collected=collected, comparisons=len(paired))
        for found in paired
    ]
    return differences, apart


def _pairs(
    first: Side, second: Side, unit: str, notes: list[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Values of the common units, for every two training runs that belong together.

    Raises:
        UserError: nothing is shared.
    """
    (arm, runs), (baseline, base) = first, second
    names = f"{arm} and {baseline}"
    found = [
        _common(runs[a], base[b], names, unit, notes)
        for a, b in _pair_seeds(runs, base, names, notes)
    ]
    trained = [len(side) for name, side in (first, second) if name not in REFERENCE_POLICIES]
    if min(trained, default=1) == 1 < max(len(runs), len(base)) and len(trained) == 2:
        notes.append(
            f"{names}: one side is a single run; its own training noise is not in the interval"
        )
    return found


def _difference(
    first: Side,
    second: Side,
    setting: Setting,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    metric: str,
    collected: Collected,
    comparisons: int,
) -> Difference:
    (arm, _), (baseline, _) = first, second
    unit: Unit = "training seeds" if len(pairs) > 1 else _unit(collected.names[setting])
    trained = [len(side) for name, side in (first, second) if name not in REFERENCE_POLICIES]
    if len(pairs) > 1:
        left, right = (np.array([p[side].mean() for p in pairs]) for side in (0, 1))
    else:
        left, right = pairs[0]
    ends = collected.ranges[setting[0]]
    return judge(
        left,
        right,
        arm=arm,
        baseline=baseline,
        unit=unit,
        env=setting[0],
        decoding=setting[1],
        metric=metric,
        comparisons=comparisons,
        fewest_runs=min(trained, default=len(pairs)),
        span=ends[1] - ends[0] if ends else None,
    )


def _pair_seeds(
    runs: Mapping[int, Episodes], base: Mapping[int, Episodes], names: str, notes: list[str]
) -> list[tuple[int, int]]:
    """Training seeds that belong together; a single run stands against all runs of the other."""
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


def _common(
    first: Episodes, second: Episodes, names: str, unit: str, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Means of the units that both sides have, in one order."""
    units = [unit for unit in first if unit in second]
    what = "evaluation seeds" if unit != "prompts" else unit
    if not units:
        raise UserError(
            f"{names} share no {what.removesuffix('s')}: evaluate both on the same {what}, so that "
            "their differences pair"
        )
    if len(units) < max(len(first), len(second)):
        most = max(len(first), len(second))
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
            "one training run an arm: nothing here tells one method from another; train at least "
            f"{FEWEST_SEEDS} seeds for that"
        )
    if any(d.coverage_observed is not None and d.coverage_observed < 0.93 for d in differences):
        notes.append(
            "some differences are so skewed that their intervals cover less than they claim: "
            "evaluate on more episodes"
        )
    return notes


def _rows_markdown(comparison: Comparison) -> str:
    lines = [
        f"| arm | environment | decoding | {comparison.metric} [95% interval] | over | episodes |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.arm} | {r.env} | {r.decoding} | {format_estimate(r.estimate)} "
        f"| {r.estimate.n} {r.unit} | {r.episodes} |"
        for r in comparison.rows
    ]
    return "\n".join(lines) + "\n"


def _differences_markdown(comparison: Comparison) -> str:
    lines = [
        "| difference | environment | decoding | mean [95% interval] | pairs | winner |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {d.arm} - {d.baseline} | {d.env} | {d.decoding} | {format_estimate(d.estimate)} "
        f"| {d.estimate.n} {d.unit} | {d.winner or 'none'} |"
        for d in comparison.differences
    ]
    return "\n".join(lines) + "\n" if comparison.differences else ""
