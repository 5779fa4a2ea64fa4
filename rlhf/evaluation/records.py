"""Read the contents of run directories for comparisons and reports."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf.common.columns import INTEGER, OBJECT, OBJECTS, Columns, check_columns
from rlhf.common.names import did_you_mean
from rlhf.common.numbers import is_number
from rlhf.common.yaml_text import read_mapping_or_empty
from rlhf.errors import UserError
from rlhf.evaluation.metric_limits import MetricLimits, ReferenceReturns
from rlhf.evaluation.metrics import COUNT_METRICS, independent_unit_of
from rlhf.runs.changes import read_changes
from rlhf.runs.claim import path_without_dot_dot
from rlhf.runs.directory import BRANCH_FILE, DATA_COUNTS_FILE
from rlhf.runs.metric_log import MetricLog
from rlhf.runs.renamed import read_episodes, read_metrics, sample_rows, upgraded_config

REFERENCE_POLICIES = ("random", "expert")
"""Policies that an environment can define; each is compared as a method of its own."""
SUMMARY_COLUMNS: Columns = {"episodes": INTEGER.as_optional(), "metrics": OBJECTS.as_optional()}
"""Columns of `summary.json` of an evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """Content of one folder of `evaluation/`: a policy in one environment with one decoding."""

    name: str
    """Name of the folder."""
    summary: Mapping[str, Any]
    """Content of `summary.json`."""
    episodes: Sequence[Mapping[str, Any]]
    """Rows of `episodes.jsonl`; empty if there are none."""

    @property
    def reference_returns(self) -> ReferenceReturns | None:
        """Returns of the environment's random and optimal policy; None if they are unknown."""
        return ReferenceReturns.if_known(self.summary.get("random"), self.summary.get("optimal"))

    @property
    def limits(self) -> MetricLimits:
        """Known limits of the metrics; summaries of older versions have only the returns."""
        turns = self.summary.get("turn_limit")
        declared = self.summary.get("outcomes")
        outcomes = None
        if isinstance(declared, Mapping):
            outcomes = {
                str(name): (float(low), float(high)) for name, (low, high) in declared.items()
            }
        return MetricLimits(
            self.reference_returns, turns if isinstance(turns, int) else None, outcomes
        )

    @property
    def has_untrained_policy(self) -> bool:
        """Whether the policy is not trained, so that it has no training seeds.

        It is a reference policy of the environment, a function, or a model on a server.
        """
        return bool(
            self.summary.get("fixed_policy") or self.summary_field("policy") in REFERENCE_POLICIES
        )

    @cached_property
    def unit_of_each_episode(self) -> list[Hashable]:
        """Independent unit of each episode, see `independent_unit_of`."""
        return [independent_unit_of(row) for row in self.episodes]

    def summary_field(self, key: str) -> str:
        """Return the value of `env`, `policy` or `decoding`; "" if it is unknown.

        The value is read from the summary, or from the first episode if the summary has none.
        """
        first = self.episodes[0] if self.episodes else {}
        return str(self.summary.get(key) or first.get(key) or "")


@dataclass(frozen=True)
class RunRecord(MetricLog):
    """Contents of one run directory."""

    directory: Path
    name: str
    """Name of the directory."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Content of `environment.json`: versions and hardware."""
    data_counts: Mapping[str, Any] = field(default_factory=dict)
    """Content of `data_counts.json`: numbers of used and dropped rows of the datasets."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Rows of `samples.jsonl` that the report shows. These are held-out episodes from before and
    after training, and training episodes with recorded tokens. The training episodes are from the
    first, the middle and the last step with recorded tokens."""
    evaluations: Sequence[Evaluation] = ()
    finished: bool = False
    """Whether the run has finished."""
    changes: Sequence[Mapping[str, Any]] = ()
    """Rows of `changes.jsonl`: settings that were changed when the run was resumed."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Content of `branch.json`: run and checkpoint from which `rlhf branch` created the run."""
    _series: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict, repr=False)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps and the values of a logged metric. The result is cached."""
        if key not in self._series:
            self._series[key] = super().series(key)
        return self._series[key]

    @property
    def training_seconds(self) -> float:
        """Duration of training in seconds; 0 if no times were logged.

        `time` is the time since the process started. If a run was resumed, the result is the sum
        over its processes, without the steps after the checkpoint that a later process repeated.
        """
        times = [float(row["time"]) for row in self.metrics if is_number(row.get("time"))]
        ends = [time for time, later in pairwise(times) if later < time]
        return sum(ends) + (times[-1] if times else 0.0)


def read_runs(directory: str | Path) -> list[RunRecord]:
    """Read the runs of a pipeline directory in order, or the single run of a run directory.

    Raises:
        UserError: The directory does not exist, is neither a pipeline nor a run directory, or is a
            pipeline directory without runs, or a file in it is damaged.
    """
    root = path_without_dot_dot(directory)
    if root.is_file():
        raise UserError(f"{root} is a file: expected a run directory, such as {root.parent}")
    if not root.is_dir():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"run directory {root} does not exist{did_you_mean(root.name, siblings)}")
    if is_run_directory(root):
        return [read_run(root)]
    stages = [
        child for child in sorted(root.iterdir()) if child.is_dir() and is_run_directory(child)
    ]
    if (root / "bench.json").exists() or (root / "bench.yaml").exists():
        raise UserError(
            f"{root} is a benchmark, not a run: its report is {root / 'report.html'}, and its runs "
            f"are in {root / 'runs'}"
        )
    if not stages and (root / "pipeline.yaml").exists():
        target = read_mapping_or_empty(root / "pipeline.yaml").get("output_dir", "its output_dir")
        raise UserError(f"{root} contains no runs; its pipeline.yaml writes them to {target}")
    if not stages:
        raise UserError(
            f"{root} is not a run directory: there is no config.yaml, metrics.jsonl or evaluation/ "
            "in it or in any of its folders"
        )
    return [read_run(child) for child in sorted(stages, key=_stage_sort_key(root))]


def is_run_directory(directory: Path) -> bool:
    """Return whether a folder is the directory of a run, which may be unfinished.

    A run directory contains config.yaml, metrics.jsonl or evaluation/.
    """
    return any(
        (directory / name).exists() for name in ("config.yaml", "metrics.jsonl", "evaluation")
    )


def read_run(directory: str | Path) -> RunRecord:
    """Read one run directory. If a file is missing, the field with its content is empty.

    The evaluations have the order of `policies` in the configuration; others follow by name.

    Raises:
        UserError: A file is damaged.
    """
    root = Path(directory)
    folder = root / "evaluation"
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    # The names of unfinished folders begin with a dot.
    names = [p for p in children if p.is_dir() and not p.name.startswith(".")]
    config = upgraded_config(read_mapping_or_empty(root / "config.yaml"))
    listed = [spec.get("name") for spec in config.get("policies") or []]
    names.sort(key=lambda p: listed.index(p.name) if p.name in listed else len(listed))
    environment = read_mapping_or_empty(root / "environment.json")
    columns = {"versions": OBJECT} if environment else {}
    check_columns(environment, columns, str(root / "environment.json"))
    return RunRecord(
        directory=root,
        name=root.resolve().name,
        config=config,
        environment=environment,
        data_counts=read_mapping_or_empty(root / DATA_COUNTS_FILE),
        metrics=read_metrics(root),
        samples=_read_samples_for_report(root),
        evaluations=[_read_evaluation(path) for path in names],
        finished=(root / "finished").exists(),
        changes=read_changes(root),
        origin=read_mapping_or_empty(root / BRANCH_FILE),
    )


def episode_value(row: Mapping[str, Any], metric: str) -> float | None:
    """Return the value of a metric for one episode; None if the metric could not be scored.

    A metric is an episode field or a reward component.

    Raises:
        UserError: The episode does not have the metric (the message suggests the nearest name), or
            the metric is "seconds", which is a mean over episodes.
    """
    if metric == "seconds":
        raise UserError("seconds cannot be compared: the value is a mean over a batch of episodes")
    components = row.get("components") or {}
    if metric in components:
        value = components[metric]
    elif metric in row and metric != "components":
        value = row[metric]
    else:
        known = [*episode_metric_names(row)]
        raise UserError(
            f"metric {metric!r} was not evaluated ({', '.join(known)}){did_you_mean(metric, known)}"
        )
    return float(value) if isinstance(value, bool) or is_number(value) else None


def episode_metric_names(row: Mapping[str, Any]) -> list[str]:
    """Return the names of an episode's metrics: numeric fields, then reward components."""
    fields = ("return", "normalized", "success", *COUNT_METRICS)
    return [name for name in fields if name in row] + list(row.get("components") or {})


def read_summary_file(path: Path) -> dict[str, Any]:
    """Read `evaluation/<name>/summary.json` of a run; return {} if the file does not exist.

    Raises:
        UserError: The file is damaged.
    """
    try:
        summary = read_mapping_or_empty(path)
        check_columns(summary, SUMMARY_COLUMNS, str(path))
        return summary
    except UserError as error:
        raise UserError(
            f"{error}; remove {path.parent} and {path.parents[2] / 'finished'}, and repeat the "
            "command of this run with --resume"
        ) from error


def _read_evaluation(folder: Path) -> Evaluation:
    """Read a folder of `evaluation/`, and add the normalized return to its episodes if it is known.

    Raises:
        UserError: A file is damaged.
    """
    summary = read_summary_file(folder / "summary.json")
    rows = read_episodes(folder)
    evaluation = Evaluation(folder.name, summary, rows)
    if bounds := evaluation.reference_returns:
        for row in rows:
            if is_number(row.get("return")):
                row["normalized"] = bounds.normalize(row["return"])
    return evaluation


def _read_samples_for_report(root: Path) -> list[dict[str, Any]]:
    """Return the rows of `samples.jsonl` that a report shows, see `RunRecord.samples`.

    The file is read row by row, because all rows together may not fit into memory.
    """
    recorded = (row["step"] for row in sample_rows(root) if has_recorded_tokens(row))
    steps = sorted(set(recorded))
    shown = {steps[i * (len(steps) - 1) // 2] for i in range(3) if steps}
    return [
        row
        for row in sample_rows(root)
        if row.get("split") in ("before", "after")
        or (row.get("step") in shown and has_recorded_tokens(row))
    ]


def has_recorded_tokens(row: Mapping[str, Any]) -> bool:
    """Return whether a row of `samples.jsonl` has recorded tokens."""
    return bool((row.get("tokens") or {}).get("text"))


def _stage_sort_key(root: Path) -> Callable[[Path], tuple[int, str, str]]:
    """Return a sort key function for the run directories of a pipeline directory.

    It sorts by the order of `stages` in pipeline.yaml, then by date, then by name.
    """
    stages = read_mapping_or_empty(root / "pipeline.yaml").get("stages") or []
    names = [s.get("name", "") if isinstance(s, dict) else str(s) for s in stages]

    def key(child: Path) -> tuple[int, str, str]:
        position = names.index(child.name) if child.name in names else len(names)
        return (
            position,
            str(read_mapping_or_empty(child / "environment.json").get("date", "")),
            child.name,
        )

    return key
