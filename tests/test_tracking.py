"""Boards are told what metrics.jsonl says: read back with each tracker's own reader."""

import os
import sys
import threading
import time

import pytest

from rlhf.cli.table import run_command
from rlhf.errors import UserError
from rlhf.runs import trackers
from rlhf.runs.directory import Run
from rlhf.runs.trackers import check_trackers_installed
from tests.helpers.training import online_tree

ROWS = [(1, {"reward/mean": 0.25, "policy/kl": 0.5}), (2, {"reward/mean": 0.75})]


def tracked(folder, name: str, *, resume: bool = False, rows=ROWS) -> Run:
    tree = {"output_dir": str(folder / "run"), "track": [name], "lr": 0.1, "resume": resume}
    run = Run.open(tree)
    for step, metrics in rows:
        run.log(step, metrics)
    run.finish()
    run.close()
    return run


def test_tensorboard_holds_every_value_and_forgets_what_was_rewound(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tracked(tmp_path, "tensorboard", rows=[*ROWS, (3, {"reward/mean": 9.0})])
    (run.directory / "finished").unlink()
    tracked(tmp_path, "tensorboard", resume=True, rows=[(3, {"reward/mean": 0.5})])
    board = EventAccumulator(str(run.directory / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["reward/mean", "policy/kl"]
    logged = {(event.step, event.value) for event in board.Scalars("reward/mean")}
    assert logged == {(1, 0.25), (2, 0.75), (3, 0.5)}


def test_mlflow_continues_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    run = tracked(tmp_path, "mlflow")
    (run.directory / "finished").unlink()
    tracked(tmp_path, "mlflow", resume=True, rows=[(3, {"reward/mean": 0.5})])
    mlflow.set_experiment("rlhf")
    (found,) = mlflow.search_runs(output_format="list")
    assert found.info.run_name == "run"
    assert found.data.params["lr"] == "0.1"
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "reward/mean")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.75), (3, 0.5)]


def test_wandb_is_told_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tracked(tmp_path, "wandb")
    (log,) = (run.directory / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"reward/mean" in log.read_bytes()


def test_trackio_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    tracked(tmp_path, "trackio")
    assert any(b"reward/mean" in p.read_bytes() for p in (tmp_path / "trackio").rglob("*.db*"))


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(
    tmp_path, echo_model, monkeypatch
):
    monkeypatch.setattr("rlhf.runs.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="track: wandb is not installed: pip install wandb"):
        run_command("rloo", online_tree(tmp_path / "run", echo_model, track=["wandb"]))
    assert not (tmp_path / "run").exists()


def test_without_a_tracker_nothing_is_looked_for(monkeypatch):
    monkeypatch.setattr("rlhf.runs.trackers.find_spec", lambda name: None)
    check_trackers_installed([])


@pytest.mark.parametrize("moment", ["open", "log", "close"])
def test_a_failing_tracker_does_not_stop_the_run(tmp_path, monkeypatch, caplog, moment):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise ConnectionError("the server is gone")

    def accept(*arguments):
        pass

    def opened(directory, config, step):
        if moment == "open":
            fail()
        log, close = (fail if moment == name else accept for name in ("log", "close"))
        return trackers.Tracker(log, close)

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", opened)
    run = tracked(tmp_path, "tensorboard")
    assert len(run.directory.joinpath("metrics.jsonl").read_text().splitlines()) == 2
    assert (run.directory / "finished").exists()
    assert "tracker tensorboard failed" in caplog.text
    assert "the server is gone (test_tracking.py:" in caplog.text
    assert len(calls) == 1


def test_a_tracker_of_another_type_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda directory, config, step: None)
    run = tracked(tmp_path, "tensorboard")
    assert "tracker tensorboard failed" in caplog.text
    assert "opened as a NoneType, not as a Tracker" in caplog.text
    assert (run.directory / "finished").exists()


@pytest.mark.parametrize("moment", ["open", "log", "close"])
def test_a_hanging_tracker_does_not_stop_the_run(tmp_path, monkeypatch, caplog, moment):
    released, calls = threading.Event(), []

    def hang(*arguments):
        calls.append(arguments)
        released.wait(60.0)

    def opened(directory, config, step):
        if moment == "open":
            hang()
        log, close = (hang if moment == name else print for name in ("log", "close"))
        return trackers.Tracker(log, close)

    monkeypatch.setattr(trackers, "LOG_LIMIT_SECONDS", 0.05)
    monkeypatch.setattr(trackers, "OPEN_OR_CLOSE_LIMIT_SECONDS", 0.05)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", opened)
    output, threads = sys.stdout, threading.active_count()
    run = tracked(tmp_path, "tensorboard")
    assert not released.is_set()
    assert sys.stdout is output
    assert len(run.directory.joinpath("metrics.jsonl").read_text().splitlines()) == 2
    assert (run.directory / "finished").exists()
    (warning,) = caplog.messages
    assert "tracker tensorboard failed and receives no further metrics" in warning
    assert "TimeoutError: took longer than 0.05 s" in warning
    assert len(calls) == 1
    released.set()
    while threading.active_count() > threads:  # the abandoned thread ends with its call
        time.sleep(0.01)


def test_a_tracker_is_used_in_one_thread_that_ends(tmp_path, monkeypatch):
    names = []

    def note(*arguments):
        names.append(threading.current_thread().name)

    def opened(directory, config, step):
        note()
        return trackers.Tracker(note, note)

    threads = threading.active_count()
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", opened)
    tracked(tmp_path, "tensorboard")
    assert len(names) == 4
    assert len(set(names)) == 1
    while threading.active_count() > threads:
        time.sleep(0.01)


def test_a_tracker_that_forks_leaves_one_process(tmp_path, monkeypatch):
    processes = []

    def fork(step, metrics):
        if child := os.fork():
            processes.append(child)

    def opened(directory, config, step):
        return trackers.Tracker(fork, lambda: None)

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", opened)
    run = tracked(tmp_path, "tensorboard")
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in processes]
    assert codes == [1, 1]
    assert len(run.directory.joinpath("metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_cannot_end_the_run_or_print_results(tmp_path, monkeypatch, caplog, capsys):
    def opened(directory, config, step):
        print("view the run at ...")
        return trackers.Tracker(lambda step, metrics: sys.exit(0), lambda: None)

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", opened)
    run = tracked(tmp_path, "tensorboard")
    assert (run.directory / "finished").exists()
    assert "called sys.exit(0)" in caplog.text
    assert capsys.readouterr() == ("", "view the run at ...\n")
