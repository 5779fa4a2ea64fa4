"""The search: an equal budget for all, on seeds and episodes of its own, continued after a kill."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli.table import COMMANDS
from rlhf.config.load import assemble_tree_and_load_plugins, build_config, set_dotted_key
from rlhf.config.tune import Dimension, TuneConfig
from rlhf.errors import UserError
from rlhf.rollout.seeds import evaluation_seed
from rlhf.studies.bench.manifest import make_bench
from rlhf.studies.jobs import Interruption, Job, JobsFailedError
from rlhf.studies.tune import run
from rlhf.studies.tune.run import FIRST_TUNING_EPISODE, TuningStudy, make_study, run_tune
from rlhf.studies.tune.search import AlgorithmSearch, Trial
from tests.helpers.bench import write_manifest
from tests.helpers.training import unknown_entries, write_rows

pytest.importorskip("optuna")

SPACE = {"x": Dimension(low=1e-3, high=10.0, log=True), "way": Dimension(choices=["a", "b"])}


def study_of(folder: Path, **keys: Any) -> Path:
    """Two methods on Echo with one seed; the divergence has no effect in the second."""
    manifest = write_manifest(folder)
    tree = yaml.safe_load(manifest.read_text())
    tree["algorithms"] = {"rloo": {}, "best_of_n": {}}
    manifest.write_text(yaml.safe_dump(tree))
    study: dict[str, Any] = {
        "output_dir": str(folder / "tune"),
        "bench": str(manifest),
        "environments": ["echo"],
        "seeds": [7],
        "trials": 2,
        "episodes": 6,
        "space": {
            "optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "algorithm.kl_coef": {"choices": [0.01, 0.1]},
        },
    }
    for key, value in keys.items():
        set_dotted_key(study, key, value)
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def fitness(trial: Trial) -> float:
    """Highest at x = 1 and way a."""
    return -abs(trial.settings["x"] - 1) - (trial.settings["way"] == "b")


def searched(folder: Path, trials: range, *, seed: int = 0) -> list[tuple[Trial, float | None]]:
    folder.mkdir(exist_ok=True)
    search = AlgorithmSearch("ppo", SPACE, folder, seed=seed)
    for number in trials:
        trial = search.trial_to_run(number)
        assert trial is not None
        search.store_score(number, fitness(trial))
    return search.trials_and_scores()


def test_a_search_that_stopped_tries_what_one_that_never_did_would_have(tmp_path):
    whole = searched(tmp_path / "whole", range(15))
    searched(tmp_path / "cut", range(6))
    search = AlgorithmSearch("ppo", SPACE, tmp_path / "cut", seed=0)
    drawn = search.trial_to_run(6)  # killed before its score came
    again = AlgorithmSearch("ppo", SPACE, tmp_path / "cut", seed=0)
    assert [again.trial_to_run(number) for number in range(6)] == [None] * 6
    assert again.trial_to_run(6) == drawn
    again.store_score(6, fitness(whole[6][0]))
    assert searched(tmp_path / "cut", range(7, 15)) == whole
    assert len({trial.settings["x"] for trial, _ in whole}) == 15
    assert searched(tmp_path / "other", range(3), seed=1) != whole[:3]


def test_the_largest_sampler_seed_is_accepted(tmp_path):
    assert len(searched(tmp_path, range(2), seed=2**32 - 1)) == 2


def test_a_search_continues_after_a_kill_that_left_the_lock_of_its_journal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # with a relative path, the link of Optuna's lock is broken
    first = searched(Path("run"), range(2))
    Path("run/optuna.log.lock").symlink_to("run/optuna.log")
    assert searched(Path("run"), range(2, 3))[:2] == first


def test_the_best_is_found_and_a_failed_trial_counts_without_a_score(tmp_path):
    whole = searched(tmp_path, range(12))
    search = AlgorithmSearch("ppo", SPACE, tmp_path, seed=0)
    search.trial_to_run(12)
    search.store_score(12, None)
    assert search.num_trials_without_score() == 1
    trial, value = search.best_trial_and_score()
    assert value == max(score for _, score in whole if score is not None)
    assert abs(trial.settings["x"] - 1) < 0.9
    lost = AlgorithmSearch("grpo", SPACE, tmp_path, seed=0)
    lost.trial_to_run(0)
    lost.store_score(0, None)
    with pytest.raises(UserError, match="all trials of grpo failed"):
        lost.best_trial_and_score()


def test_trials_beyond_a_reduced_number_are_not_used(tmp_path):
    """An interrupted search may have stored more trials of one algorithm than of another."""
    whole = searched(tmp_path, range(12))
    fewer = AlgorithmSearch("ppo", SPACE, tmp_path, seed=0, num_trials=4)
    assert fewer.trials_and_scores() == whole[:4]
    assert fewer.best_trial_and_score()[1] == max(
        score for _, score in whole[:4] if score is not None
    )


class OneFailure:
    """A launcher in which the first job of a trial fails for the given reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def run_jobs(self, jobs: list[Job], title: str) -> dict[str, str]:
        return {jobs[0].key: self.reason}


@pytest.mark.parametrize("reason", ["the run diverged", Interruption("the disk is full")])
def test_a_trial_that_was_stopped_from_outside_has_not_failed(tmp_path, monkeypatch, reason):
    """A resumed search continues it; a trial that failed by itself is not repeated."""
    tree = assemble_tree_and_load_plugins([study_of(tmp_path / "s")], [])
    study = make_study(build_config(TuneConfig, tree), COMMANDS)
    study.root.mkdir()
    monkeypatch.setattr(TuningStudy, "trial_score", lambda *_: 0.5)
    searches = {name: AlgorithmSearch(name, SPACE, study.root, seed=0) for name in study.spaces}
    with contextlib.suppress(JobsFailedError):
        run._run_trial_of_every_algorithm(study, searches, OneFailure(reason), 0)
    first, second = study.spaces
    stopped = isinstance(reason, Interruption)
    resumed = AlgorithmSearch(first, SPACE, study.root, seed=0)
    assert (resumed.trial_to_run(0) is not None) == stopped
    assert [score for _, score in searches[second].trials_and_scores()] == [
        None if stopped else 0.5
    ]


@pytest.mark.slow
def test_tuned_settings_go_into_the_bench_with_the_budget_that_found_them(tmp_path):
    path = study_of(tmp_path / "s")
    tuned = run_tune(
        make_study(build_config(TuneConfig, assemble_tree_and_load_plugins([path], [])), COMMANDS)
    )
    assert not unknown_entries(tuned.parent)
    tree = yaml.safe_load(tuned.read_text())
    assert set(tree["algorithms"]["rloo"]["run"]) == {"optimizer", "algorithm"}
    assert set(tree["algorithms"]["best_of_n"]["run"]) == {"optimizer"}
    tuning = tree["tuning"]
    assert tuning["left_out"] == {"best_of_n": ["algorithm.kl_coef"]}
    assert (tuning["trials"], tuning["failed_trials"]) == (2, {"rloo": 0, "best_of_n": 0})
    # Equal budgets: as many runs for each, every one of them measured on episodes of tuning only.
    rows = (tmp_path / "s/tune/trials.csv").read_text().splitlines()
    assert [sum(row.startswith(name) for row in rows) for name in ("rloo", "best_of_n")] == [2, 2]
    files = sorted((tmp_path / "s/tune/trials").glob("*/*/echo/seed7/evaluate/**/episodes.jsonl"))
    assert len(files) == 4
    seeds = {
        json.loads(line)["seed"]
        for file in files
        for line in file.read_text().rstrip("\n").split("\n")
    }
    assert seeds == {evaluation_seed(FIRST_TUNING_EPISODE + index) for index in range(6)}
    bench = make_bench(
        assemble_tree_and_load_plugins([tmp_path / "s/manifest.yaml", tuned], []), COMMANDS
    )
    rate = tree["algorithms"]["rloo"]["run"]["optimizer"]["learning_rate"]
    assert bench.run_config_tree("echo", "rloo", 0)["optimizer"]["learning_rate"] == rate
    with pytest.raises(UserError, match="seeds: seed 7 was used for tuning"):
        make_bench(
            assemble_tree_and_load_plugins(
                [tmp_path / "s/manifest.yaml", tuned], [("seeds", [6, 7])]
            ),
            COMMANDS,
        )
    # A lost result is written again without a new trial.
    tuned.unlink()
    stamps = {file: file.stat().st_mtime_ns for file in files}
    run_tune(
        make_study(
            build_config(TuneConfig, assemble_tree_and_load_plugins([path], [("resume", True)])),
            COMMANDS,
        )
    )
    assert yaml.safe_load(tuned.read_text()) == tree
    assert stamps == {file: file.stat().st_mtime_ns for file in files}


@pytest.mark.parametrize(
    ("key", "value"),
    [("episodes", 8), ("seeds", [9]), ("sampler_seed", 5), ("space.num_steps", {"choices": [4]})],
)
def test_a_resumed_study_that_changed_is_refused(tmp_path, monkeypatch, key, value):
    path = study_of(tmp_path / "s")
    record_study(path, monkeypatch)
    with pytest.raises(UserError, match=f"another configuration: {key}"):
        run_tune(make_study(study_of_tree(path, key, value), COMMANDS))


def test_a_resumed_study_with_another_manifest_is_refused(tmp_path, monkeypatch):
    path = study_of(tmp_path / "s")
    record_study(path, monkeypatch)
    manifest = tmp_path / "s/manifest.yaml"
    tree = yaml.safe_load(manifest.read_text())
    set_dotted_key(tree, "run.num_steps", 6)
    manifest.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"the content of bench .* has changed"):
        run_tune(make_study(study_of_tree(path, "trials", 3), COMMANDS))


def record_study(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a study that ends before its first trial."""
    monkeypatch.setattr(run, "_run_search", lambda study, jobs: (study.root / "optuna.log").touch())
    run_tune(
        make_study(build_config(TuneConfig, assemble_tree_and_load_plugins([path], [])), COMMANDS)
    )


def study_of_tree(path: Path, key: str, value: Any) -> TuneConfig:
    """The resumed study with a changed key."""
    return build_config(
        TuneConfig, assemble_tree_and_load_plugins([path], [(key, value), ("resume", True)])
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"trails": 3}, ["'trails'", "'trials'"]),
        ({"seeds": [5, 1]}, ["seeds: 1 is one of the benchmark's"]),
        ({"environments": ["ecko"]}, ["'ecko'", "'echo'"]),
        ({"space": {"optimizer.lr": {"choices": [1]}}}, ["space.optimizer.lr", "optimizer.lr"]),
        ({"space": {"num_steps": {"low": 4}}}, ["space.num_steps", "low must be below high"]),
        ({"space": {"num_steps": {"log": True}}}, ["space.num_steps", "give either low and high"]),
        ({"space": {"num_steps": {"lo": 3}}}, ["space.num_steps", "'lo'", "'low'"]),
        ({"space": {"num_steps": 3}}, ["space.num_steps", "expected a mapping with low, high"]),
        ({"space": {"num_steps": {"choices": [4, -2]}}}, ["space.num_steps", "with -2"]),
        ({"space": {"algorithm.lam": {"choices": [1.0]}}}, ["algorithm.lam has no effect in any"]),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, keys, words):
    path = study_of(tmp_path / "s")
    tree = yaml.safe_load(path.read_text()) | keys
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as caught:
        make_study(build_config(TuneConfig, assemble_tree_and_load_plugins([path], [])), COMMANDS)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_study_is_not_resumed_with_a_changed_plug_in_of_its_manifest(tmp_path, monkeypatch):
    """Otherwise its later trials would be those of another algorithm than its earlier ones."""
    path = study_of(tmp_path / "s")
    code = tmp_path / "s" / "mine.py"
    code.write_text(
        "from rlhf.plugins import register_advantage\n"
        "@register_advantage('mine', 'Zero')\n"
        "def zero(batch, settings): return None\n"
    )
    manifest = tmp_path / "s" / yaml.safe_load(path.read_text())["bench"]
    (games := tmp_path / "s" / "games").mkdir()
    tree = yaml.safe_load(manifest.read_text()) | {"plugins": [str(code)]}
    tree["environments"]["echo"]["env"]["kwargs"] = {"folder": str(games)}
    manifest.write_text(yaml.safe_dump(tree))

    def search(study: Any, config: Any) -> Path:
        return write_rows(study.root / "optuna.log", [{}])

    monkeypatch.setattr(run, "_run_search", search)
    monkeypatch.setattr(run, "check_model_and_environments", lambda bench: None)

    def start(**keys: Any) -> Path:
        tree = assemble_tree_and_load_plugins([path], []) | keys
        return run_tune(make_study(build_config(TuneConfig, tree), COMMANDS))

    start()
    (games / "compiled").write_text("a game")  # an environment may write to its folder
    start(resume=True, trials=3)
    code.write_text(code.read_text().replace("Zero", "Nought"))
    with pytest.raises(UserError, match=r"content of manifest\.plugins\.0"):
        start(resume=True)
