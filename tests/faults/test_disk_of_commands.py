"""A full disk ends evaluate, bench, tune and compare in one line that says what to do."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.faults.process import fail_writes, limit_file_size, rlhf
from tests.helpers.bench import write_manifest
from tests.helpers.runs import write_run
from tests.helpers.training import offline_tree, online_tree, sft_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]


def evaluate(folder: Path) -> tuple[str, ...]:
    tree = {
        "output_dir": str(folder / "out"),
        "policies": [{"name": "random"}],
        "env": {"id": "text/Echo-v0"},
        "episodes": 4,
    }
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(tree))
    return "evaluate", "--config", str(folder / "evaluate.yaml")


def bench(folder: Path) -> tuple[str, ...]:
    return "bench", str(write_manifest(folder / "study"))


def tune(folder: Path) -> tuple[str, ...]:
    pytest.importorskip("optuna")
    tree = {
        "output_dir": str(folder / "tune"),
        "bench": str(write_manifest(folder / "study")),
        "environments": ["echo"],
        "seeds": [7],
        "trials": 2,
        "episodes": 6,
        "space": {"algorithm.kl_coef": {"choices": [0.01, 0.1]}},
    }
    (folder / "tune.yaml").write_text(yaml.safe_dump(tree))
    return "tune", str(folder / "tune.yaml")


COMMANDS = {"evaluate": evaluate, "bench": bench, "tune": tune}


def check_one_line(code: int, errors: str, words: str) -> None:
    lines = [line for line in errors.splitlines() if line.startswith("rlhf: ")]
    assert code == 2, errors
    assert len(lines) == 1, errors
    assert words in lines[0], lines
    assert "Traceback" not in errors, errors


@pytest.mark.parametrize(
    ("command", "opening"), [("evaluate", 1), ("evaluate", 3), ("bench", 1), ("tune", 1)]
)
def test_a_full_disk_is_one_line(command: str, opening: int, tmp_path: Path) -> None:
    words = COMMANDS[command](tmp_path)
    code, errors = rlhf(*words, fault=partial(fail_writes, tmp_path, opening))
    check_one_line(code, errors, "the disk is full; free space")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_limit_of_file_sizes_also_in_the_processes_of_a_study(
    command: str, tmp_path: Path
) -> None:
    words = COMMANDS[command](tmp_path)
    code, errors = rlhf(*words, fault=partial(limit_file_size, 2000))
    check_one_line(code, errors, "a file exceeds the limit of file sizes; raise it (ulimit -f)")


def test_a_comparison_that_cannot_be_printed_is_one_line(tmp_path: Path) -> None:
    """The text is still in the buffer of standard output when the process ends."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no device that is always full")
    for name, value in (("a", 0.0), ("b", 1.0)):
        write_run(tmp_path / name, dict.fromkeys(range(8), value))
    with full.open("w") as device:
        done = subprocess.run(
            [sys.executable, "-m", "rlhf", "compare", str(tmp_path / "a"), str(tmp_path / "b")],
            stdout=device,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    check_one_line(done.returncode, done.stderr, "the disk is full; free space")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("opening", [1, 3, 4])
@pytest.mark.parametrize("command", ["init", "report"])
def test_a_command_without_a_run_can_be_repeated_after_a_full_disk(
    command: str, opening: int, tmp_path: Path
) -> None:
    for name, value in (("a", 0.0), ("b", 1.0)):
        write_run(tmp_path / "runs" / name, dict.fromkeys(range(8), value))
    runs = [str(tmp_path / "runs/a"), str(tmp_path / "runs/b")]
    page = str(tmp_path / "out/page.html")
    words = {
        "init": ("init", "project", str(tmp_path / "out")),
        "report": ("report", *runs, "--output", page),
    }[command]
    code, errors = rlhf(*words, fault=partial(fail_writes, tmp_path / "out", opening))
    check_one_line(code, errors, "the disk is full; free space")
    code, errors = rlhf(*words)
    assert code == 0, errors


def test_a_branch_on_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, echo_model: Path
) -> None:
    """The error of a copied folder is a list of the errors of its files."""
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert rlhf("ppo", "--config", str(tmp_path / "run.yaml"))[0] == 0
    out = tmp_path / "out"
    out.mkdir()
    words = ("branch", str(tmp_path / "run/checkpoints/step-1"), str(out / "branch"))
    opened = tmp_path / "opened"
    opened.touch()
    assert rlhf(*words, fault=partial(fail_writes, out, sys.maxsize, opened))[0] == 0
    number = opened.stat().st_size
    for opening in range(1, number + 1, 3):
        shutil.rmtree(out / "branch", ignore_errors=True)
        code, errors = rlhf(*words, fault=partial(fail_writes, out, opening))
        check_one_line(code, errors, "the disk is full; free space")
        assert "Errno" not in errors
        assert list(out.iterdir()) == []


@pytest.mark.parametrize("engine", ["native", "trl"])
def test_a_file_of_a_checkpoint_that_is_too_large_is_named_by_its_folder(
    engine: str, tmp_path: Path, echo_model: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    config = tmp_path / "sft.yaml"
    config.write_text(
        yaml.safe_dump(offline_tree(tmp_path / "run", echo_model, data, engine=engine))
    )
    size = (echo_model / "model.safetensors").stat().st_size - 1
    code, errors = rlhf("sft", "--config", str(config), fault=partial(limit_file_size, size))
    check_one_line(code, errors, f"rlhf: {tmp_path / 'run/checkpoints'}")
    check_one_line(code, errors, "raise it (ulimit -f)")
