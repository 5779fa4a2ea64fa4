"""`rlhf tune`: search hyperparameters with the same number of trials for every algorithm.

    rlhf tune STUDY.yaml [--jobs 2] [--resume]
    rlhf bench MANIFEST.yaml --config runs/tune/tuned.yaml

A trial trains an algorithm with one combination of hyperparameters in every environment and
training seed of the study. The score of the trial is the mean normalized return on held-out
episodes. The seeds and episodes differ from those of the benchmark, so that the benchmark does not
use the data by which the hyperparameters were selected.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.algorithms import registry
from rlhf.commands.command import CommandTable
from rlhf.common.files import write_text
from rlhf.common.names import did_you_mean
from rlhf.common.text import count_text
from rlhf.common.yaml_text import dump_yaml
from rlhf.config.launcher import LAUNCHER_KEYS, LauncherConfig
from rlhf.config.load import assemble_tree_and_load_plugins, merge_trees, set_dotted_key
from rlhf.config.tune import Dimension, TuneCommandConfig, TuneConfig
from rlhf.errors import UserError
from rlhf.reports.markup import Cell, Table
from rlhf.reports.tables import save_table_csv
from rlhf.runs.changes import check_only_permitted_changes
from rlhf.runs.inputs import input_fingerprints
from rlhf.studies.bench.manifest import build_manifest_entry, make_bench
from rlhf.studies.bench.plan import Bench
from rlhf.studies.bench.run import check_model_and_environments
from rlhf.studies.bench.scores import (
    environment_reference_returns,
    mean_return,
    read_evaluation_summary,
)
from rlhf.studies.jobs import (
    Interruption,
    Job,
    JobsFailedError,
    failed_jobs_text,
    lock_study_directory,
    study_config_without_directory_keys,
)
from rlhf.studies.launchers import Launcher, make_launcher
from rlhf.studies.tune.search import AlgorithmSearch, Trial

log = logging.getLogger(__name__)

STUDY_FILE = "tune.yaml"
"""Name of the file with the study's configuration."""
TUNED_FILE = "tuned.yaml"
"""Name of the file with the best hyperparameters."""
_MANIFEST = "manifest"
"""Key of the manifest's settings among the inputs of a study."""
FIRST_TUNING_EPISODE = 2**29
"""Index of the first held-out episode for tuning; the episodes of a benchmark start at index 0."""


@dataclass(frozen=True)
class TuningStudy:
    """A checked study: its benchmark and the search space of each algorithm."""

    config: TuneConfig
    bench: Bench
    """The benchmark with the environments and training seeds of the study."""
    spaces: Mapping[str, Mapping[str, Dimension]]
    """Algorithm -> dimensions of the search space that affect it."""

    @property
    def root(self) -> Path:
        """The study's directory."""
        return Path(self.config.output_dir)

    @property
    def unused_keys(self) -> dict[str, list[str]]:
        """Algorithm -> keys of the search space that do not affect it."""
        every = self.config.space
        unused = {
            name: [key for key in every if key not in space] for name, space in self.spaces.items()
        }
        return {name: keys for name, keys in unused.items() if keys}

    def trial_jobs(self, algorithm: str, trial: Trial) -> list[Job]:
        """Return the jobs of a trial; each trains and evaluates one run (environment and seed)."""
        return [self._trial_job(algorithm, trial, *cell) for cell in self.environment_seed_pairs]

    def trial_score(self, algorithm: str, trial: Trial) -> float:
        """Return the mean normalized return of a finished trial over environments and seeds."""
        scores = []
        for environment, seed in self.environment_seed_pairs:
            stage = self._trial_job(algorithm, trial, environment, seed).stages[-1]
            summary = read_evaluation_summary(Path(stage[1]["output_dir"]), algorithm)
            bounds = environment_reference_returns(self.bench, environment, summary)
            scores.append(bounds.normalize(mean_return(summary)))
        return float(np.mean(scores))

    @property
    def environment_seed_pairs(self) -> list[tuple[str, int]]:
        """All pairs (environment, training seed); every trial has a run for each."""
        return list(itertools.product(self.bench.environments, self.config.seeds))

    def _trial_job(self, algorithm: str, trial: Trial, environment: str, seed: int) -> Job:
        """Return the job of one run of a trial and its evaluation on the tuning episodes."""
        bench, key = self.bench, f"{algorithm}/trial{trial.number}/{environment}/seed{seed}"
        folder = self.root / "trials" / key
        run = bench.run_config_tree(environment, algorithm, seed)
        for name, value in trial.settings.items():
            set_dotted_key(run, name, value)
        # The evaluation in the training run uses the episodes of the benchmark, so a separate
        # evaluation is needed.
        run |= {"output_dir": str(folder / "run"), "evaluation": {"episodes": 2}}
        policy = {"name": algorithm, "model": {"path": str(folder / "run" / "final")}}
        evaluate = bench.evaluate_config_tree(environment, [policy], folder / "evaluate") | {
            "rollout": run.get("rollout", {}),
            "episodes": self.config.episodes,
            "first_episode": FIRST_TUNING_EPISODE,
        }
        start = bench.initial_model_job(environment, seed).key
        return Job(key, ((bench.command_of(algorithm), run), ("evaluate", evaluate)), start)


def run(config: TuneCommandConfig, commands: CommandTable) -> Generator[str, None, int]:
    """Run the search; yield the path of tuned.yaml, and return the exit code 0."""
    yield str(run_tune(make_study(config, commands), config))
    return 0


def plan(name: str, config: TuneCommandConfig, commands: CommandTable) -> str:
    """Check a study and describe its runs, for `--dry-run`."""
    study = make_study(config, commands)
    bench = study.bench
    runs = config.trials * len(bench.environments) * len(config.seeds)
    lines = [
        f"{count_text(config.trials, 'trial')} for each of {', '.join(study.spaces)}: "
        f"{count_text(runs, 'run')} per algorithm, "
        f"on {', '.join(bench.environments)} with seeds {', '.join(map(str, config.seeds))}"
    ]
    lines += [
        f"{name}: without effect: {', '.join(keys)}" for name, keys in study.unused_keys.items()
    ]
    return "\n".join(lines)


def make_study(config: TuneConfig, commands: CommandTable) -> TuningStudy:
    """Build a study and its benchmark from a configuration, and check both.

    Raises:
        UserError: A key is wrong or does not fit the benchmark; the message names the key.
    """
    tree = assemble_tree_and_load_plugins([config.bench], [])
    if shared := sorted(set(config.seeds) & set(tree.get("seeds") or ())):
        raise UserError(
            f"seeds: {shared[0]} is one of the benchmark's seeds; use other seeds for tuning, "
            "because a comparison on the seeds that selected the settings is biased"
        )
    known = tree.get("environments") or {}
    for name in config.environments:
        if name not in known:
            raise UserError(
                f"environments: {config.bench} has no {name!r}{did_you_mean(name, known)}"
            )
    overrides = {
        "output_dir": config.output_dir,
        "seeds": config.seeds,
        "environments": {k: v for k, v in known.items() if k in (config.environments or known)},
        "plugins": list(dict.fromkeys([*config.plugins, *(tree.get("plugins") or [])])),
        "tuning": {},
    }
    bench = make_bench(tree | overrides, commands)
    space = {
        k: build_manifest_entry(Dimension, item, f"space.{k}") for k, item in config.space.items()
    }
    spaces = {name: _effective_dimensions(bench, name, space) for name in bench.algorithms}
    _check_search_space(tree | overrides, spaces, space, commands)
    return TuningStudy(config, bench, spaces)


def run_tune(study: TuningStudy, launcher: LauncherConfig | None = None) -> Path:
    """Run the trials of every algorithm that are not finished; return the path of tuned.yaml.

    Raises:
        UserError: The model or an environment cannot be loaded, the directory exists and neither
            `resume` nor `overwrite` is set, the study or its manifest has changed since it started,
            Optuna is not installed, the training of an initial model failed, a run was interrupted
            by a signal or a write error, or every trial of an algorithm failed.
    """
    check_model_and_environments(study.bench)
    # The files that the manifest names, such as its plug-ins, are inputs of the study too.
    tree = study_config_without_directory_keys(study.config) | {
        _MANIFEST: study_config_without_directory_keys(study.bench.config)
    }
    if study.config.resume and not study.config.overwrite and (study.root / STUDY_FILE).exists():
        check_only_permitted_changes(
            study.root,
            tree,
            config_file_name=STUDY_FILE,
            ignored_keys=LAUNCHER_KEYS | {"trials", _MANIFEST},
        )
    with lock_study_directory(study.root, STUDY_FILE, study.config, study.bench.commands):
        write_text(study.root / "inputs.json", json.dumps(input_fingerprints(tree), indent=2))
        return _run_search(study, launcher or LauncherConfig())


def _run_search(study: TuningStudy, config: LauncherConfig) -> Path:
    """Run all trials with a launcher and write the result; return the path of tuned.yaml.

    Raises:
        JobsFailedError: The training of an initial model failed, or a run was interrupted.
        UserError: Optuna is not installed, or every trial of an algorithm failed.
    """
    searches = {
        name: AlgorithmSearch(
            name,
            space,
            study.root,
            seed=study.config.sampler_seed,
            num_trials=study.config.trials,
        )
        for name, space in study.spaces.items()
    }
    with make_launcher(config, study.bench.commands, study.root) as launcher:
        starts = [study.bench.initial_model_job(*cell) for cell in study.environment_seed_pairs]
        if failed := launcher.run_jobs(starts, "start models"):
            key, reason = next(iter(failed.items()))
            raise JobsFailedError(f"{key}: {reason}")
        for number in range(study.config.trials):
            _run_trial_of_every_algorithm(study, searches, launcher, number)
    return _write_tuned_settings(study, searches)


def _run_trial_of_every_algorithm(
    study: TuningStudy, searches: Mapping[str, AlgorithmSearch], launcher: Launcher, number: int
) -> None:
    """Run the trial `number` of every algorithm in parallel; finished trials are not repeated.

    Raises:
        JobsFailedError: A signal or a write error, such as a full disk, stopped a run. A resumed
            search continues the trial.
    """
    unfinished = {name: search.trial_to_run(number) for name, search in searches.items()}
    trials = {name: trial for name, trial in unfinished.items() if trial is not None}
    jobs = {name: study.trial_jobs(name, trial) for name, trial in trials.items()}
    every_job = [job for trial_jobs in jobs.values() for job in trial_jobs]
    failed = launcher.run_jobs(every_job, f"trial {number + 1} of {study.config.trials}")
    interrupted = {key: text for key, text in failed.items() if isinstance(text, Interruption)}
    if interrupted:
        raise JobsFailedError(failed_jobs_text(interrupted))
    for name, trial in trials.items():
        reasons = [failed[job.key] for job in jobs[name] if job.key in failed]
        if reasons:
            log.warning("%s, trial %d failed: %s", name, number + 1, reasons[0])
        searches[name].store_score(number, None if reasons else study.trial_score(name, trial))


def _effective_dimensions(
    bench: Bench, algorithm: str, space: Mapping[str, Dimension]
) -> dict[str, Dimension]:
    """Return the dimensions of a search space that have an effect in an algorithm.

    Only settings of algorithms, with keys `algorithm.*`, can be without effect.
    """
    command = bench.command_of(algorithm)
    environment = next(iter(bench.environments))
    settings = bench.run_config_tree(environment, algorithm, bench.config.seeds[0]).get(
        "algorithm", {}
    )
    effective = registry.configured_algorithm(command, **settings).settings_with_effect
    every = {f"algorithm.{name}" for name in registry.setting_names()}
    ineffective = every - {f"algorithm.{name}" for name in effective}
    return {key: item for key, item in space.items() if key not in ineffective}


def _check_search_space(
    tree: Mapping[str, Any],
    spaces: Mapping[str, Mapping[str, Dimension]],
    space: Mapping[str, Dimension],
    commands: CommandTable,
) -> None:
    """Check that each key of the search space is valid in the configuration of a run.

    The check uses all choices of a key, or both ends of its range.

    Raises:
        UserError: A key does not exist, has no effect in any algorithm, or a value is invalid.
    """
    if unused := [key for key in space if not any(key in spaces[name] for name in spaces)]:
        raise UserError(
            f"space.{unused[0]} has no effect in any of the algorithms {', '.join(spaces)}"
        )
    for key, item in space.items():
        for value in item.choices or (item.low, item.high):
            run = _nested_settings({key: value})
            algorithms = {name: {"run": run} for name in spaces if key in spaces[name]}
            try:
                make_bench(merge_trees(tree, {"algorithms": algorithms}), commands)
            except UserError as error:
                raise UserError(f"space.{key}: with {value!r}, {error}") from error


def _nested_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings with dotted keys to the configuration of a run."""
    run: dict[str, Any] = {}
    for key, value in settings.items():
        set_dotted_key(run, key, value)
    return run


def _write_tuned_settings(study: TuningStudy, searches: Mapping[str, AlgorithmSearch]) -> Path:
    """Write tuned.yaml and the table of trials; return the path of tuned.yaml.

    The file contains the best settings of each algorithm, for `rlhf bench --config`, and a
    description of the search.

    Raises:
        UserError: Every trial of an algorithm failed.
    """
    config, best = (
        study.config,
        {name: search.best_trial_and_score() for name, search in searches.items()},
    )
    algorithms = {
        name: {"run": _nested_settings(trial.settings)} for name, (trial, _) in best.items()
    }
    tuning = {
        "trials": config.trials,
        "seeds": config.seeds,
        "episodes": config.episodes,
        "environments": list(study.bench.environments),
        "algorithms": list(algorithms),
        "space": config.space,
        "left_out": study.unused_keys,
        "best_scores": {name: round(value, 4) for name, (_, value) in best.items()},
        "failed_trials": {
            name: search.num_trials_without_score() for name, search in searches.items()
        },
    }
    tree = {"algorithms": algorithms, "tuning": tuning}
    path = study.root / TUNED_FILE
    write_text(path, dump_yaml(tree))
    save_table_csv(study.root, _trial_table(searches, list(config.space)))
    for name, (_, value) in best.items():
        log.info("%s: best of %d trials %.3f", name, config.trials, value)
    return path


def _trial_table(searches: Mapping[str, AlgorithmSearch], keys: Sequence[str]) -> Table:
    """Return the table of all trials, with their scores and hyperparameters."""
    rows: list[list[Cell]] = [
        [name, trial.number, value, *(trial.settings.get(key) for key in keys)]
        for name, search in searches.items()
        for trial, value in search.trials_and_scores()
    ]
    return Table("trials", "Trials", ["algorithm", "trial", "score", *keys], rows)
