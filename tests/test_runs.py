"""The run directory: what is written, what is refused, what survives a crash."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from rlhf.errors import UserError
from rlhf.runs.directory import Run, describe_machine, flatten


def config(directory, **keys):
    return {
        "command": "ppo",
        "output_dir": str(directory),
        "resume": False,
        "overwrite": False,
    } | keys


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    before = {p.name: p.read_bytes() for p in run.directory.iterdir() if p.is_file()}
    with pytest.raises(UserError, match="exists already: continue it with --resume"):
        Run.open(config(tmp_path / "run"))
    assert before == {p.name: p.read_bytes() for p in run.directory.iterdir() if p.is_file()}


def test_an_empty_existing_directory_is_fine(tmp_path):
    (tmp_path / "run").mkdir()
    assert Run.open(config(tmp_path / "run")).directory.exists()


def test_overwrite_replaces_a_run_but_nothing_else(tmp_path):
    run = Run.open(config(tmp_path / "run"))
    run.log(1, {"a": 1.0})
    Run.open(config(tmp_path / "run", overwrite=True))
    assert not (run.directory / "metrics.jsonl").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a run directory"):
        Run.open(config(tmp_path / "thesis", overwrite=True))
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years of work"


def test_a_refused_run_restores_the_run_that_it_would_have_replaced(tmp_path):
    Run.open(config(tmp_path / "run")).log(1, {"a": 1.0})
    refused = Run.open(config(tmp_path / "run", overwrite=True))
    refused.discard_if_unused()
    assert rows(tmp_path / "run/metrics.jsonl")[0]["a"] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    replacing = Run.open(config(tmp_path / "run", overwrite=True))
    replacing.log(1, {"a": 2.0})
    replacing.discard_if_unused()
    assert rows(tmp_path / "run/metrics.jsonl")[0]["a"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_resumed_run_must_carry_the_same_configuration(tmp_path):
    asked = config(tmp_path / "run", optimizer={"learning_rate": 1e-5}, seed=0)
    Run.open(asked)
    assert Run.open(asked | {"resume": True})
    with pytest.raises(UserError, match=r"seed was 0, now 1$"):
        Run.open(asked | {"resume": True, "seed": 1})
    changed = {"resume": True, "optimizer": {"learning_rate": 1e-4}, "seed": 1}
    with pytest.raises(UserError, match=r"optimizer\.learning_rate was 1e-05, .*and 1 more"):
        Run.open(asked | changed)


def test_a_run_may_be_moved_and_then_resumed(tmp_path):
    run = Run.open(config(tmp_path / "run"))
    run.directory.rename(tmp_path / "moved")
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
        run.sample(
            {"step": step, "split": "train", "messages": [{"role": "user", "content": "Grüße"}]}
        )
    run.sample({"step": 3, "split": "after", "messages": []})
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
    assert Run.open(config(tmp_path / "run", resume=True)).finished


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {
        "a.b": 1,
        "a.c.d": [2],
        "e": None,
    }
