"""Which runs are training seeds of one method, and the values they were evaluated to."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.evaluation.metrics import outcome_range, unit_name
from rlhf.evaluation.records import (
    REFERENCE_POLICIES,
    Bounds,
    Evaluation,
    RunRecord,
    episode_value,
)

_SEED_PART = re.compile(r"[-_.]?seed[-_=]?(\d+)", re.IGNORECASE)

Setting = tuple[str, str]
"""Environment and decoding: values are compared only within one setting."""
Episodes = dict[Hashable, list[float]]
"""Independent unit -> values of its episodes."""
Arm = dict[Setting, dict[int, Episodes]]
"""Setting -> training seed -> episodes."""


def label_runs(directories: Sequence[Path]) -> list[str]:
    """Arm of each directory: its path without seed parts, as short as still tells arms apart."""
    stripped = []
    for directory in directories:
        parts = [_SEED_PART.sub("", part) for part in directory.resolve().parts]
        stripped.append([part for part in parts if part] or ["run"])
    return _shortest_tails(stripped)


def name_runs(directories: Sequence[Path]) -> list[str]:
    """The shortest end of each directory's path that no other one shares."""
    return _shortest_tails([list(directory.resolve().parts) for directory in directories])


def _shortest_tails(paths: Sequence[list[str]]) -> list[str]:
    distinct = len({tuple(parts) for parts in paths})
    depth = 1
    while len({tuple(parts[-depth:]) for parts in paths}) < distinct:
        depth += 1
    return ["/".join(parts[-depth:]) for parts in paths]


@dataclass(frozen=True)
class Measured:
    """One evaluation, and the arm and training seed that it measured."""

    evaluation: Evaluation
    arm: str
    seed: int
    """Training seed; 0 for a reference policy, which was never trained."""

    @property
    def is_reference(self) -> bool:
        """Whether nobody trained this policy."""
        return self.arm in REFERENCE_POLICIES


def measured(runs: Sequence[RunRecord]) -> list[Measured]:
    """Every evaluation with episodes under the arm it belongs to.

    `rlhf evaluate` measures the models of several runs in one directory. There the policy's name
    takes the place of the directory's, as if the run of that name had been measured in its own,
    and replaces what that run measured of itself at its end.
    """
    # Runs that name their policies come first, so that theirs is the order of the table.
    ordered = sorted(runs, key=lambda run: not _names_policies(run))
    found = [(run, e) for run in ordered for e in run.evaluations if e.episodes]
    paths = [_home(run, evaluation) for run, evaluation in found]
    owners: dict[tuple[str, int, str, str], Path] = {}
    kept = []
    for (run, evaluation), label in zip(found, label_runs(paths), strict=True):
        policy = evaluation.describe("policy")
        arm, seed = (policy, 0) if policy in REFERENCE_POLICIES else (label, training_seed(run))
        setting = (evaluation.describe("env"), evaluation.describe("decoding"))
        if owners.setdefault((arm, seed, *setting), run.directory) == run.directory:
            kept.append(Measured(evaluation, arm, seed))
    return kept


@dataclass(frozen=True)
class Collected:
    """The values of one metric."""

    arms: dict[str, Arm]
    notes: list[str]
    """What was left out."""
    ranges: Mapping[str, tuple[float, float] | None]
    """Environment -> smallest and largest possible value, where they are known."""
    limits: Mapping[str, Bounds | None]
    """Environment -> what its random and its optimal policy reach."""
    episodes: Mapping[tuple[str, Setting], int]
    """Arm and setting -> episodes."""
    names: Mapping[Setting, str]
    """What the units of a setting are called, see `unit_name`."""


def collect_arms(runs: Sequence[RunRecord], metric: str) -> Collected:
    """Values of `metric` by arm, setting, training seed and independent unit, and notes on gaps."""
    raw: dict[tuple[str, Setting, int, Hashable], list[float]] = defaultdict(list)
    lost: Counter[str] = Counter()
    episodes: Counter[tuple[str, Setting]] = Counter()
    seen: dict[tuple[str, Setting, int], Counter[tuple[int, int]]] = defaultdict(Counter)
    values: dict[str, list[float]] = defaultdict(list)
    limits: dict[str, Bounds | None] = {}
    units: dict[Setting, str] = {}
    for item in measured(runs):
        found = item.evaluation.episodes
        for row, unit in zip(found, item.evaluation.units, strict=True):
            value = episode_value(row, metric)
            if value is None:
                lost[item.arm] += 1
                continue
            setting = (str(row["env"]), str(row["decoding"]))
            raw[item.arm, setting, item.seed, unit].append(value)
            episodes[item.arm, setting] += 1
            seen[item.arm, setting, item.seed][row["seed"], row.get("sample", 0)] += 1
            values[setting[0]].append(value)
            limits[setting[0]] = item.evaluation.bounds
        if found:
            setting = (str(found[0]["env"]), str(found[0]["decoding"]))
            name = unit_name(item.evaluation.units)
            units[setting] = name if name != "episodes" else units.get(setting, name)
    arms: dict[str, Arm] = {}
    for (name, setting, seed, unit), some in raw.items():
        arms.setdefault(name, {}).setdefault(setting, {}).setdefault(seed, {})[unit] = some
    notes = [f"{name}: {n} episodes without {metric} left out" for name, n in lost.items()]
    notes += [
        f"{name}: {repeated} episodes repeat an evaluation seed; they count as one with the first"
        for (name, *_), counts in seen.items()
        if (repeated := sum(n - 1 for n in counts.values()))
    ]
    ranges = {env: outcome_range(metric, some, limits[env]) for env, some in values.items()}
    return Collected(arms, notes, ranges, limits, episodes, units)


def training_seed(run: RunRecord) -> int:
    """The seed in the run's path (`seed3`), else the one in its configuration, else 0."""
    found = _SEED_PART.findall(str(run.directory.resolve()))
    return int(found[-1]) if found else int(run.config.get("seed") or 0)


def _names_policies(run: RunRecord) -> bool:
    """Whether a run directory measured policies under names of their own."""
    trained = {e.describe("policy") for e in run.evaluations} - {*REFERENCE_POLICIES, ""}
    return "policies" in run.config or len(trained) > 1


def _home(run: RunRecord, evaluation: Evaluation) -> Path:
    """The directory of the run that an evaluation speaks of."""
    named = _names_policies(run) and evaluation.describe("policy")
    return run.directory.resolve().parent / Path(named).name if named else run.directory
