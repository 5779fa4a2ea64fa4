"""`rlhf sweep`: run a training command with every combination of settings, and compare them.

    rlhf sweep SWEEP.yaml [--jobs 2] [--launcher slurm] [--resume]

The seeds are the independent units of the intervals.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.commands.command import CommandTable
from rlhf.commands.dry_run import check_config_without_data
from rlhf.common.files import read_log, write_text
from rlhf.common.names import did_you_mean
from rlhf.common.numbers import is_number
from rlhf.common.plugins import load_plugins
from rlhf.common.text import count_text
from rlhf.config.base import TrainingConfig
from rlhf.config.launcher import LauncherConfig
from rlhf.config.load import assemble_tree_and_load_plugins, merge_trees
from rlhf.config.sweep import SweepCommandConfig, SweepConfig
from rlhf.errors import UserError
from rlhf.evaluation.compare import format_estimate
from rlhf.reports.markup import Cell, Table, esc, section_html, sentence_html
from rlhf.reports.page import page_html
from rlhf.reports.scatter import Point, scatter_html
from rlhf.reports.tables import save_tables
from rlhf.stats import Interval, interval
from rlhf.studies.jobs import Job, JobsFailedError, failed_jobs_text, lock_study_directory
from rlhf.studies.launchers import make_launcher

_NUM_COLORS = 6
SWEEP_FILE = "sweep.yaml"
"""Name of the file with the sweep's configuration."""


@dataclass(frozen=True)
class Setting:
    """A combination of values of the grid."""

    values: Mapping[str, Any]
    """Dotted configuration key -> value."""

    @property
    def name(self) -> str:
        """Name of the setting's folder, which depends only on the values."""
        values = sorted(self.values.items())
        text = ",".join(f"{key.split('.')[-1]}={value}" for key, value in values)
        readable = re.sub(r"[^\w.+=-]+", "_", text)[:60].lstrip(".+=-")
        canonical = json.dumps(values, sort_keys=True)
        return f"{readable}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class SettingResult:
    """Metric of the runs of a setting."""

    setting: Setting
    values: list[float]
    """Last value of the metric of each run, in the order of the seeds; can be infinite or nan."""

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite."""
        return all(map(math.isfinite, self.values))

    @property
    def mean(self) -> Interval:
        """Mean of the metric over seeds; nan if a value is not finite."""
        if self.is_finite:
            return interval(self.values)
        count = sum(not math.isfinite(value) for value in self.values)
        reason = f"the value of {count} of {len(self.values)} seeds is not finite"
        return Interval.without_bounds(math.nan, len(self.values), reason)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep."""

    config: SweepConfig
    """Configuration of the sweep, in which `run` includes the files of `base`."""
    commands: CommandTable
    """Commands that the jobs run."""

    @property
    def root(self) -> Path:
        """The sweep's directory."""
        return Path(self.config.output_dir)

    @property
    def page(self) -> Path:
        """The HTML page with the result."""
        return self.root / "report.html"

    @property
    def settings(self) -> list[Setting]:
        """All combinations of the values of the grid."""
        keys = list(self.config.grid)
        return [
            Setting(dict(zip(keys, values, strict=True)))
            for values in itertools.product(*self.config.grid.values())
        ]

    def run_path(self, setting: Setting, seed: int) -> Path:
        """Return the run directory of a setting and a seed."""
        return self.root / "runs" / setting.name / f"seed{seed}"

    def run_config_tree(self, setting: Setting, seed: int) -> dict[str, Any]:
        """Return the configuration of one run."""
        tree = assemble_tree_and_load_plugins([self.config.run], list(setting.values.items()))
        return {
            **tree,
            "output_dir": str(self.run_path(setting, seed)),
            "seed": seed,
            "resume": True,
        }

    def jobs(self) -> list[Job]:
        """Return a job for each setting and seed."""
        return [
            Job(
                f"{setting.name}/seed{seed}",
                ((self.config.run_command, self.run_config_tree(setting, seed)),),
            )
            for seed in self.config.seeds
            for setting in self.settings
        ]


def make_sweep(config: SweepConfig, commands: CommandTable) -> Sweep:
    """Build a sweep, and check the configuration of every setting.

    Raises:
        UserError: The command trains no model, a configuration of a run is invalid, or two settings
            have the same configuration.
    """
    run = merge_trees(assemble_tree_and_load_plugins(config.base, []), config.run)
    if plugins := [*config.plugins, *run.get("plugins", [])]:
        run["plugins"] = list(dict.fromkeys(plugins))
        load_plugins(run["plugins"])
    command = commands[config.run_command]
    if not command.makes_run or command.runs_commands:
        training = [name for name, row in commands.items() if row.makes_run]
        hint = did_you_mean(config.run_command, training)
        raise UserError(f"run_command: {config.run_command!r} cannot be swept{hint}")
    for key in ("output_dir", "seed", "resume", "overwrite", "command"):
        run.pop(key, None)
    sweep = Sweep(replace(config, run=run, base=[]), commands)
    shown_by_config: dict[str, str] = {}
    for setting in sweep.settings:
        shown = ", ".join(f"{key} = {value!r}" for key, value in setting.values.items())
        try:
            built = commands.config_from_tree(
                config.run_command, sweep.run_config_tree(setting, config.seeds[0])
            )
            check_config_without_data(config.run_command, built, with_model=False)
        except ValueError as error:  # includes UserError
            raise UserError(f"{config.run_command} with {shown}: {error}") from error
        if not isinstance(built, TrainingConfig):
            raise UserError(f"run_command: rlhf {config.run_command} trains no model")
        tree = asdict(built) | {"output_dir": None}
        other = shown_by_config.setdefault(json.dumps(tree, sort_keys=True, default=repr), shown)
        if other != shown:
            raise UserError(f"grid: {other} and {shown} are the same configuration")
    return sweep


def run_sweep(sweep: Sweep, launcher: LauncherConfig | None = None) -> list[SettingResult]:
    """Run all unfinished jobs with a launcher, write the tables and the page; return the results.

    Raises:
        UserError: The directory exists and neither `resume` nor `overwrite` is set, some jobs
            failed, or the runs did not log the metric; finished runs are kept.
    """
    jobs = sweep.jobs()
    with lock_study_directory(sweep.root, SWEEP_FILE, sweep.config, sweep.commands, jobs):
        with make_launcher(launcher or LauncherConfig(), sweep.commands, sweep.root) as started:
            failed = started.run_jobs(jobs, sweep.root.name)
        if failed:
            raise JobsFailedError(failed_jobs_text(failed))
        results = read_setting_results(sweep)
        write_result(sweep, results)
        return results


def run(config: SweepCommandConfig, commands: CommandTable) -> Generator[str, None, int]:
    """Run a sweep; yield the lines to print, and return the exit code 0."""
    sweep = make_sweep(config, commands)
    results = run_sweep(sweep, config)
    yield from result_lines(config, results)
    yield str(sweep.page)
    return 0


def plan(name: str, config: SweepCommandConfig, commands: CommandTable) -> str:
    """Check a sweep and describe its runs, for `--dry-run`."""
    sweep = make_sweep(config, commands)
    first = commands.config_from_tree(config.run_command, sweep.jobs()[0].stages[0][1])
    runs = count_text(len(sweep.jobs()), "run")
    settings = count_text(len(sweep.settings), "setting")
    return "\n".join(
        [
            f"{runs}: {settings} x {count_text(len(config.seeds), 'seed')}",
            "the first run:",
            commands.plan(config.run_command, first),
        ]
    )


def last_metric_values(directory: Path) -> dict[str, float]:
    """Return the last value of every metric that a run logged, which can be infinite or nan."""
    last: dict[str, float] = {}
    for row in read_log(directory / "metrics.jsonl"):
        last |= {
            key: float(value)
            for key, value in row.items()
            if "/" in key and isinstance(value, int | float) and not isinstance(value, bool)
        }
    return last


def last_metric_value(directory: Path, metric: str) -> float:
    """Return the last value of a metric that a run logged, which can be infinite or nan.

    Raises:
        UserError: The run did not log the metric.
    """
    last = last_metric_values(directory)
    if metric not in last:
        raise UserError(
            f"metric: {directory} logged no {metric!r}{did_you_mean(metric, last)}; the run is "
            "kept: continue with --resume and another --metric"
        )
    return last[metric]


def read_setting_results(sweep: Sweep) -> list[SettingResult]:
    """Return the result of each setting, best first.

    Settings with a value that is not finite are last.
    """
    metric = sweep.config.metric
    results = [
        SettingResult(
            setting,
            [
                last_metric_value(sweep.run_path(setting, seed), metric)
                for seed in sweep.config.seeds
            ],
        )
        for setting in sweep.settings
    ]
    sign = 1 if sweep.config.goal == "minimize" else -1
    finite = [result for result in results if result.is_finite]
    rest = [result for result in results if not result.is_finite]
    return sorted(finite, key=lambda result: sign * result.mean.value) + rest


def result_lines(config: SweepConfig, results: Sequence[SettingResult]) -> list[str]:
    """Return sentences about the best setting and about the uncertainty of this choice.

    `results` are in the order of `read_setting_results`.
    """
    best = results[0]
    if not best.is_finite:
        return [f"no setting has a finite {config.metric} with every seed"]
    shown = ", ".join(f"{key} = {value}" for key, value in best.setting.values.items())
    better = "lowest" if config.goal == "minimize" else "highest"
    estimate = format_estimate(best.mean, ".4g")
    lines = [f"{better} mean {config.metric}: {estimate} with {shown}"]
    if diverged := sum(not result.is_finite for result in results):
        lines.append(f"{diverged} of {len(results)} settings are last: a value is not finite")
    if len(results) > 1:
        lines.append(
            f"this is the best of {len(results)} settings on the same seeds, so its mean is biased "
            "toward better values: repeat it with other seeds before you report it"
        )
    return lines


def write_result(sweep: Sweep, results: Sequence[SettingResult]) -> None:
    """Write the tables and the page of a sweep."""
    config, keys = sweep.config, list(sweep.config.grid)
    settings: list[list[Cell]] = [
        [*_grid_cells(result.setting, keys), result.mean, result.setting.name] for result in results
    ]
    runs: list[list[Cell]] = [
        [*_grid_cells(result.setting, keys), seed, value]
        for result in results
        for seed, value in zip(config.seeds, result.values, strict=True)
    ]
    tables = [
        Table("settings", "Settings", [*keys, config.metric, "folder"], settings),
        Table("runs", "Every run", [*keys, "seed", config.metric], runs),
    ]
    metrics = _all_metrics_table(sweep, results)
    save_tables(sweep.root / "tables", [*tables, metrics])
    notes = [
        *result_lines(config, results),
        f"each run is `rlhf {config.run_command}`; intervals are 95% intervals over training seeds",
    ]
    body = "\n".join(
        [
            f"<header><h1>Sweep of {esc(config.run_command)}</h1></header>",
            *(f'<p class="note">{sentence_html(note)}.</p>' for note in notes),
            section_html("Every run in a plot", _scatter_html(sweep, results)),
            *(section_html(table.title, table.to_html()) for table in tables),
        ]
    )
    write_text(sweep.page, page_html("Sweep", body))


def _all_metrics_table(sweep: Sweep, results: Sequence[SettingResult]) -> Table:
    """Return the table with the last value of every metric of every run."""
    keys, rows = list(sweep.config.grid), []
    last = _last_finite_metric_values(sweep, results)
    names = sorted({name for values in last.values() for name in values})
    for (index, seed), values in last.items():
        grid = _grid_cells(results[index].setting, keys)
        rows.append([*grid, seed, *map(values.get, names)])
    return Table("metrics", "Last value of every metric", [*keys, "seed", *names], rows)


def _scatter_html(sweep: Sweep, results: Sequence[SettingResult]) -> str:
    """Return the plot of any two quantities of the runs: metrics, and numbers of the grid.

    At first, it shows the reward against the KL if they were logged. Otherwise, it shows the metric
    of the sweep against the first number of the grid or, without one, against another metric. The
    six best settings have colors.
    """
    points = []
    for (index, seed), values in _last_finite_metric_values(sweep, results).items():
        grid = results[index].setting.values
        shown = ", ".join(f"{key} = {value}" for key, value in grid.items())
        numbers = {key: float(value) for key, value in grid.items() if is_number(value)}
        color = f"c{index + 1}" if index < _NUM_COLORS else "ref"
        points.append(Point(f"{shown}, seed {seed}", {**values, **numbers}, color))
    known = {name for point in points for name in point.values}
    x, y = "policy/kl", "reward/mean"
    if not {x, y} <= known:
        numeric = [key for key in sweep.config.grid if key in known]
        others = sorted(known - {sweep.config.metric})
        x, y = next(iter([*numeric, *others]), sweep.config.metric), sweep.config.metric
    note = (
        "The last value of each run. The six best settings have colors, best first; the others are "
        "gray. Point at a run for its setting."
    )
    return scatter_html(points, x=x, y=y, title="Runs", note=note)


def _last_finite_metric_values(
    sweep: Sweep, results: Sequence[SettingResult]
) -> dict[tuple[int, int], dict[str, float]]:
    """Return (index of the setting in `results`, seed) -> last finite value of each metric."""
    return {
        (index, seed): {
            name: value
            for name, value in last_metric_values(sweep.run_path(result.setting, seed)).items()
            if math.isfinite(value)
        }
        for index, result in enumerate(results)
        for seed in sweep.config.seeds
    }


def _grid_cells(setting: Setting, keys: Sequence[str]) -> list[Cell]:
    """Return the values of a setting as cells of a table."""
    return [
        value if isinstance(value, str) or is_number(value) else json.dumps(value, default=str)
        for value in map(setting.values.get, keys)
    ]
