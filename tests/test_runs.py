"""The run directory: what is written, what is refused, what survives a crash."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf.errors import UserError
from rlhf.runs.checksums import write_checksums
from rlhf.runs.directory import Run, flatten_keys, lock_directory_and_write_config
from rlhf.runs.machine import describe_machine


def config(directory, **keys):
    return {
        "command": "ppo",
        "output_dir": str(directory),
        "resume": False,
        "overwrite": False,
    } | keys


def rows(path):
    return [json.loads(line) for line in path.read_text().rstrip("\n").split("\n")]


def test_a_new_directory_says_what_was_asked_and_where_it_ran(tmp_path):
    run = Run.open(config(tmp_path / "deep/run", model={"path": "m"}, seed=3))
    kept = yaml.safe_load((run.directory / "config.yaml").read_text())
    assert kept == {"command": "ppo", "model": {"path": "m"}, "seed": 3}
    environment = json.loads((run.directory / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["cores"] >= 1
    assert not run.finished


def test_the_environment_names_the_commit_of_a_checkout():
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert describe_machine()["commit"] == head


def test_an_existing_directory_is_refused_and_left_alone(tmp_path):
    run = Run.open(config(tmp_path / "run"))
    run.log(1, {"a": 1.0})
    run.close()
    before = {p.name: p.read_bytes() for p in run.directory.iterdir() if p.is_file()}
    with pytest.raises(UserError, match="exists already: continue the run with --resume"):
        Run.open(config(tmp_path / "run"))
    assert before == {p.name: p.read_bytes() for p in run.directory.iterdir() if p.is_file()}


def test_an_empty_existing_directory_is_fine(tmp_path):
    (tmp_path / "run").mkdir()
    assert Run.open(config(tmp_path / "run")).directory.exists()


def finished_run(directory, **metrics):
    run = Run.open(config(directory))
    run.log(1, metrics or {"a": 1.0})
    run.finish()
    run.close()
    return run


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_overwrite_replaces_a_run_but_nothing_else(tmp_path):
    finished_run(tmp_path / "run")
    run = Run.open(config(tmp_path / "run", overwrite=True))
    assert not (run.directory / "metrics.jsonl").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a run directory"):
        Run.open(config(tmp_path / "thesis", overwrite=True))
    assert names(tmp_path / "thesis") == ["chapter.txt"]


def test_a_run_without_a_result_restores_the_run_that_it_would_have_replaced(tmp_path):
    finished_run(tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    refused = Run.open(config(tmp_path / "run", overwrite=True))
    assert "metrics.jsonl" not in names(tmp_path / "run")
    refused.close()
    after = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    assert after == before
    replacing = Run.open(config(tmp_path / "run", overwrite=True))
    replacing.log(1, {"a": 2.0})
    replacing.close()
    assert rows(tmp_path / "run/metrics.jsonl")[0]["a"] == 2.0
    assert ".replaced" not in names(tmp_path / "run")


def test_a_process_killed_while_it_replaced_a_run_loses_nothing(tmp_path):
    finished_run(tmp_path / "run")
    killed = "import os, signal, sys, json; from rlhf.runs.directory import Run\n"
    killed += "run = Run.open(json.loads(sys.argv[1]))\nos.kill(os.getpid(), signal.SIGKILL)"
    tree = config(tmp_path / "run", overwrite=True)
    result = subprocess.run([sys.executable, "-c", killed, json.dumps(tree)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert "metrics.jsonl" not in names(tmp_path / "run")
    assert Run.open(config(tmp_path / "run", resume=True)).finished
    assert rows(tmp_path / "run/metrics.jsonl")[0]["a"] == 1.0


def test_files_that_no_run_wrote_stay(tmp_path):
    finished_run(tmp_path / "run")
    (tmp_path / "run/notes.txt").write_text("mine")
    (tmp_path / "run/src").mkdir()
    (tmp_path / "run/src/main.py").write_text("mine too")
    finished = Run.open(config(tmp_path / "run", overwrite=True))
    finished.log(1, {"a": 3.0})
    finished.close()
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    assert (tmp_path / "run/src/main.py").read_text() == "mine too"


def test_a_foreign_file_among_the_results_is_named(tmp_path):
    run = finished_run(tmp_path / "run")
    run.final.mkdir()
    (run.final / "model.safetensors").write_text("weights")
    write_checksums(run.final)
    (run.final / "card.md").write_text("written by hand")
    with pytest.raises(UserError, match=r"final/card\.md was not written by the toolkit"):
        Run.open(config(tmp_path / "run", overwrite=True))
    assert (run.final / "card.md").exists()
    (run.final / "card.md").unlink()
    Run.open(config(tmp_path / "run", overwrite=True)).close()
    assert (run.final / "model.safetensors").read_text() == "weights"


def test_a_directory_with_an_input_of_the_run_is_not_overwritten(tmp_path, monkeypatch):
    run = finished_run(tmp_path / "run")
    run.final.mkdir()
    tree = config(tmp_path / "run", overwrite=True, model={"path": str(run.final)})
    with pytest.raises(UserError, match=r"this command reads .*final in it"):
        Run.open(tree)
    monkeypatch.chdir(run.final)
    with pytest.raises(UserError, match="working directory"):
        Run.open(config(tmp_path / "run", overwrite=True))
    monkeypatch.setenv("HOME", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="home directory"):
        Run.open(config(tmp_path / "run", overwrite=True))
    assert (tmp_path / "run/finished").exists()


def test_a_link_to_a_run_is_overwritten_in_place(tmp_path):
    finished_run(tmp_path / "run")
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    run = Run.open(config(tmp_path / "latest", overwrite=True))
    run.log(1, {"a": 5.0})
    run.close()
    assert rows(tmp_path / "run/metrics.jsonl")[0]["a"] == 5.0
    assert (tmp_path / "latest").is_symlink()


def test_one_process_writes_a_directory(tmp_path):
    run = Run.open(config(tmp_path / "run"))
    run.log(1, {"a": 1.0})
    for keys in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on "):
            Run.open(config(tmp_path / "run", **keys))
    run.close()
    Run.open(config(tmp_path / "run", resume=True)).close()


def test_a_run_is_not_replaced_by_a_resumption(tmp_path):
    finished_run(tmp_path / "run")
    with pytest.raises(UserError, match="resume continues a run and overwrite replaces it"):
        Run.open(config(tmp_path / "run", resume=True, overwrite=True))
    assert rows(tmp_path / "run/metrics.jsonl")


def test_a_refused_resumption_marks_nothing(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project/config.yaml").write_text("name: of another program\n")
    with pytest.raises(UserError, match="another configuration"):
        Run.open(config(tmp_path / "project", resume=True))
    assert names(tmp_path / "project") == ["config.yaml"]
    with pytest.raises(UserError, match="is not a run directory"):
        Run.open(config(tmp_path / "project", overwrite=True))


def test_changed_inputs_are_named_and_moved_ones_are_recognized(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("one\n")
    tree = config(tmp_path / "run", data=[{"path": str(data)}])
    run = Run.open(tree)
    run.log(1, {"a": 1.0})
    run.close()
    data.rename(tmp_path / "moved.jsonl")
    moved = tree | {"data": [{"path": str(tmp_path / "moved.jsonl")}], "resume": True}
    Run.open(moved).close()
    data.write_text("another\n")
    with pytest.raises(UserError, match=r"data\.0\.path was .*moved\.jsonl', now .*data\.jsonl'"):
        Run.open(tree | {"resume": True})
    (tmp_path / "moved.jsonl").write_text("two\n")
    with pytest.raises(UserError, match=r"content of data\.0\.path .* has changed"):
        Run.open(moved)


def test_an_input_that_was_missing_for_a_while_is_still_compared(tmp_path):
    """A resumption that fails because a file is missing keeps the fingerprint of the file."""
    code = tmp_path / "score.py"
    code.write_text("def f(c):\n    return [1.0] * len(c)\n")
    tree = config(tmp_path / "run", rewards=[{"kind": "function", "path": f"{code}:f"}])
    run = Run.open(tree)
    run.log(1, {"a": 1.0})
    run.close()
    code.unlink()
    Run.open(tree | {"resume": True}).close()
    code.write_text("def f(c):\n    return [2.0] * len(c)\n")
    with pytest.raises(UserError, match=r"content of rewards\.0\.path .* has changed"):
        Run.open(tree | {"resume": True})


def test_a_resumed_run_must_carry_the_same_configuration(tmp_path):
    asked = config(tmp_path / "run", optimizer={"learning_rate": 1e-5}, seed=0)
    run = Run.open(asked)
    run.log(1, {"a": 1.0})
    run.close()
    Run.open(asked | {"resume": True}).close()
    with pytest.raises(UserError, match=r"seed was 0, now 1$"):
        Run.open(asked | {"resume": True, "seed": 1})
    changed = {"resume": True, "optimizer": {"learning_rate": 1e-4}, "seed": 1}
    with pytest.raises(UserError, match=r"optimizer\.learning_rate was 1e-05, .*and 1 more"):
        Run.open(asked | changed)


def test_a_run_may_be_moved_and_then_resumed(tmp_path):
    run = Run.open(config(tmp_path / "run"))
    run.log(1, {"a": 1.0})
    run.directory.rename(tmp_path / "moved")
    run.close()
    assert Run.open(config(tmp_path / "moved", resume=True))


@pytest.mark.parametrize("part", ["file", "file/run"])
def test_a_directory_that_cannot_be_written_is_told_in_one_line(tmp_path, part):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as caught:
        Run.open(config(tmp_path / part))
    assert str(tmp_path / part) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "in the way"


def test_resuming_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no config\.yaml, so there is nothing to resume"):
        Run.open(config(tmp_path / "run", resume=True))


@pytest.mark.parametrize("name", ["pipeline.yaml", "bench.yaml", "tune.yaml"])
@pytest.mark.parametrize("content", ["train.jsonl", "runs/notes.txt", "logs/1.log", "{name}"])
def test_a_folder_of_the_user_is_not_resumed_as_a_study(tmp_path, name, content):
    path = tmp_path / "mine" / content.format(name=name)
    path.parent.mkdir(parents=True)
    path.write_text("written by hand")
    with (
        pytest.raises(UserError, match="so there is nothing to resume"),
        lock_directory_and_write_config(tmp_path / "mine", name, {}, resume=True, overwrite=False),
    ):
        pass
    assert [p for p in (tmp_path / "mine").rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "written by hand"


def test_a_study_that_was_killed_before_its_description_is_resumed(tmp_path):
    (tmp_path / "empty").mkdir()
    run = Run.open(config(tmp_path / "array/runs/job"))
    run.log(1, {"a": 1.0})
    run.close()
    for name in ("empty", "array"):
        with lock_directory_and_write_config(
            tmp_path / name, "bench.yaml", {}, resume=True, overwrite=False
        ):
            assert (tmp_path / name / "bench.yaml").exists()


def test_a_run_that_was_killed_before_its_description_starts(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    host = platform.node().replace(".", "-")[:16]
    (tmp_path / f"run/.config.yaml.{host}.1234567.rlhf-part").write_text("seed: ")
    run = Run.open(config(tmp_path / "run", resume=True))
    assert (run.directory / "config.yaml").exists()
    assert not list(run.directory.glob(".config.yaml.*"))
    run.close()


def test_log_lines_carry_step_and_time(tmp_path):
    run = Run.open(config(tmp_path / "run"))
    run.log(1, {"train/loss": 0.5})
    run.log(2, {"train/loss": 0.25})
    one, two = rows(run.directory / "metrics.jsonl")
    assert (one["step"], one["train/loss"]) == (1, 0.5)
    assert two["time"] >= one["time"] >= 0


def test_rewind_drops_later_steps_and_a_line_cut_by_a_kill(tmp_path):
    run = Run.open(config(tmp_path / "run"))
    for step in range(1, 6):
        run.log(step, {"a": float(step)})
        run.write_sample(
            {"step": step, "split": "train", "messages": [{"role": "user", "content": "Grüße"}]}
        )
    run.write_sample({"step": 3, "split": "after", "messages": []})
    with (run.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "a"')
    run.rewind(3)
    assert [row["step"] for row in rows(run.directory / "metrics.jsonl")] == [1, 2, 3]
    samples = rows(run.directory / "samples.jsonl")
    assert [row["step"] for row in samples] == [1, 2, 3]
    assert samples[0]["messages"][0]["content"] == "Grüße"


def test_the_mark_of_a_finished_run(tmp_path):
    run = Run.open(config(tmp_path / "run"))
    run.finish()
    run.close()
    assert Run.open(config(tmp_path / "run", resume=True)).finished


def test_flatten():
    assert flatten_keys({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {
        "a.b": 1,
        "a.c.d": [2],
        "e": None,
    }
