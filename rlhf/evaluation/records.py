"""Run directories read back for comparison and report; whatever is missing yet is simply empty."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rlhf.common.files import read_log
from rlhf.common.names import nearest
from rlhf.errors import UserError
from rlhf.evaluation.metrics import unit_of
from rlhf.runs.renamed import current_config, current_metrics, current_sample, run_file
from rlhf.stats import Interval

REFERENCE_POLICIES = ("random", "expert")
"""Policies that no run trained; they are read as arms of their own."""


@dataclass(frozen=True)
class Bounds:
    """What the random and the optimal policy reach in an environment: 0 and 1 of its scores."""

    random: float
    optimal: float

    @classmethod
    def known(cls, random: Any, optimal: Any) -> Bounds | None:
        """None where one is unknown, or nothing lies between them."""
        there = is_number(random) and is_number(optimal) and random != optimal
        return cls(float(random), float(optimal)) if there else None

    def normalise(self, value: float) -> float:
        """(value - random) / (optimal - random)"""
        return (value - self.random) / (self.optimal - self.random)

    def normalised(self, found: Interval) -> Interval:
        """The same for an estimate and its interval."""
        factor = 1 / (self.optimal - self.random)
        return found.scaled(factor, -self.random * factor)


@dataclass(frozen=True)
class Evaluation:
    """One folder of `evaluation/`: a policy on an environment with one way of decoding."""

    name: str
    summary: Mapping[str, Any]
    episodes: Sequence[Mapping[str, Any]]

    @property
    def bounds(self) -> Bounds | None:
        """Of the environment, if the summary knows them."""
        return Bounds.known(self.summary.get("random"), self.summary.get("optimal"))

    @cached_property
    def units(self) -> list[Hashable]:
        """The independent unit of each episode, see `unit_of`."""
        return [unit_of(row) for row in self.episodes]

    def describe(self, key: str) -> str:
        """`env`, `policy` or `decoding`, from the summary or the first episode; "" if unknown."""
        first = self.episodes[0] if self.episodes else {}
        return str(self.summary.get(key) or first.get(key) or "")


@dataclass(frozen=True)
class RunRecord:
    """What one run directory holds at this moment."""

    directory: Path
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Evaluation] = ()
    finished: bool = False

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of one metric key, in order of step."""
        rows = [r for r in self.metrics if is_number(r.get("step")) and is_number(r.get(key))]
        rows.sort(key=lambda row: row["step"])
        return [float(row["step"]) for row in rows], [float(row[key]) for row in rows]


def is_number(value: object) -> bool:
    """A finite int or float (bool is not a number here)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_stages(directory: str | Path) -> list[RunRecord]:
    """The runs of a pipeline directory in order, or the one run of a run directory.

    Raises UserError when the folder is missing or holds neither.
    """
    root = Path(directory)
    if not root.is_dir():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"run directory {root} does not exist{nearest(root.name, siblings)}")
    if is_run(root):
        return [read_run(root)]
    stages = [child for child in sorted(root.iterdir()) if child.is_dir() and is_run(child)]
    if (root / "bench.json").exists() or (root / "bench.yaml").exists():
        raise UserError(
            f"{root} is a benchmark: `rlhf bench` drew its report.html; the runs lie in "
            f"{root / 'runs'}"
        )
    if not stages and not (root / "pipeline.yaml").exists():
        raise UserError(
            f"{root} is no run directory: it has no config.yaml, metrics.jsonl or evaluation/, "
            "and no folder in it has"
        )
    return [read_run(child) for child in sorted(stages, key=_stage_order(root))]


def is_run(directory: Path) -> bool:
    """Whether a folder looks like a run directory, finished or not."""
    return any(
        (directory / name).exists() for name in ("config.yaml", "metrics.jsonl", "evaluation")
    )


def read_run(directory: str | Path) -> RunRecord:
    """One run directory; absent files give empty fields, a half-written last line is left out."""
    root = Path(directory)
    folder = root / "evaluation"
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [p for p in children if p.is_dir() and not p.name.startswith(".")]  # .NAME.part
    config = current_config(_read_mapping(run_file(root, "config.yaml")))
    listed = [spec.get("name") for spec in config.get("policies") or []]
    names.sort(key=lambda p: listed.index(p.name) if p.name in listed else len(listed))
    return RunRecord(
        directory=root,
        name=root.resolve().name,
        config=config,
        environment=_read_mapping(root / "environment.json"),
        metrics=[current_metrics(row) for row in read_log(run_file(root, "metrics.jsonl"))],
        samples=[current_sample(row) for row in read_log(run_file(root, "samples.jsonl"))],
        evaluations=[_read_evaluation(path) for path in names],
        finished=(root / "finished").exists(),
    )


def episode_value(row: Mapping[str, Any], metric: str) -> float | None:
    """A metric of one episode, by field or reward component; None where it could not be scored.

    Raises UserError naming the nearest known metric when the episode has no such field.
    """
    if metric == "seconds":
        raise UserError("seconds cannot be compared: an episode has its share of a batch's time")
    components = row.get("components") or {}
    if metric in components:
        value = components[metric]
    elif metric in row and metric != "components":
        value = row[metric]
    else:
        known = [*episode_metrics(row)]
        raise UserError(
            f"metric {metric!r} is not among the evaluated ones ({', '.join(known)})"
            f"{nearest(metric, known)}"
        )
    if value is None or isinstance(value, bool):
        return None if value is None else float(value)
    return float(value) if is_number(value) else None


def episode_metrics(row: Mapping[str, Any]) -> list[str]:
    """Names of the metrics that an episode carries: numeric fields, then reward components."""
    fields = (
        "return",
        "normalized",
        "success",
        "cost",
        "turns",
        "invalid",
        "tokens",
        "cut",
    )
    return [name for name in fields if name in row] + list(row.get("components") or {})


def _read_evaluation(folder: Path) -> Evaluation:
    summary = _read_mapping(folder / "summary.json")
    rows = [current_sample(row) for row in read_log(folder / "episodes.jsonl")]
    for number, row in enumerate(rows, start=1):
        if missing := [key for key in ("env", "decoding", "seed") if key not in row]:
            raise UserError(
                f"{folder / 'episodes.jsonl'}:{number}: an episode without {missing[0]}"
            )
    evaluation = Evaluation(folder.name, summary, rows)
    if bounds := evaluation.bounds:
        for row in rows:
            if is_number(row.get("return")):
                row["normalized"] = bounds.normalise(row["return"])
    return evaluation


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: cannot be read: {error}".splitlines()[0]) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping, got {type(tree).__name__}")
    return tree


def _stage_order(root: Path):
    """Sort key: the order of `stages` in pipeline.yaml, then of creation, then of name."""
    stages = _read_mapping(root / "pipeline.yaml").get("stages") or []
    names = [s.get("name", "") if isinstance(s, dict) else str(s) for s in stages]

    def key(child: Path) -> tuple[int, str, str]:
        place = names.index(child.name) if child.name in names else len(names)
        return place, str(_read_mapping(child / "environment.json").get("date", "")), child.name

    return key
