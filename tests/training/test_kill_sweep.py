"""Every command that makes a run ends with the same files after a kill at any moment."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.bench import write_manifest
from tests.helpers.training import (
    Tree,
    label_rows,
    offline_tree,
    online_tree,
    pair_rows,
    save_model,
    sft_rows,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[2]
KILLS = 50

HOOK = """
import os, signal, sys

folder, counter = os.environ["KILL_FOLDER"], os.environ["KILL_COUNTER"]
moment = int(os.environ["KILL_MOMENT"])

def count(event, arguments):
    changes = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if (changes or writes) and folder in os.path.abspath(str(arguments[0])):
        file = os.open(counter, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, b".")
        operations = os.fstat(file).st_size
        os.close(file)
        if operations == moment:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
"""
"""A `sitecustomize` for a run and its workers, which kills the process that is about to do the
given file operation below a folder; 0 is never."""


def sft(folder: Path, **keys: Any) -> Tree:
    rows = write_rows(folder / "rows.jsonl", sft_rows())
    return offline_tree(Path("run"), folder / "model", rows, **keys)


def pairs(folder: Path, **keys: Any) -> Tree:
    rows = write_rows(folder / "rows.jsonl", pair_rows())
    return offline_tree(Path("run"), folder / "model", rows, **keys)


def labels(folder: Path) -> Tree:
    rows = write_rows(folder / "rows.jsonl", label_rows())
    return offline_tree(Path("run"), folder / "model", rows)


def online(folder: Path) -> Tree:
    return online_tree(Path("run"), folder / "model")


def groups(folder: Path) -> Tree:
    return online_tree(Path("run"), folder / "model", algorithm={"group_size": 4})


def evaluate(folder: Path) -> Tree:
    tree = online(folder)
    policies = [{"name": "model", "model": tree["model"]}, {"name": "random"}]
    kept = {key: tree[key] for key in ("output_dir", "env", "rewards", "rollout")}
    return kept | {"policies": policies, "episodes": 8}


def pipeline(folder: Path) -> Tree:
    first, second = sft(folder), online(folder)
    del first["output_dir"], second["output_dir"]
    second["model"] = {"path": "stage:first"}
    stages = [
        {"name": "first", "command": "sft", **first},
        {"name": "second", "command": "ppo", **second},
    ]
    return {"output_dir": "run", "stages": stages}


def bench(folder: Path) -> Tree:
    tree = yaml.safe_load(write_manifest(folder / "bench").read_text())
    del tree["environments"]["maze"]
    return tree | {"output_dir": "run", "algorithms": {"rloo": {}}}


def tune(folder: Path) -> Tree:
    manifest = folder / "manifest.yaml"
    manifest.write_text(yaml.safe_dump(bench(folder) | {"output_dir": "unused"}))
    return {
        "output_dir": "run",
        "bench": str(manifest),
        "environments": ["echo"],
        "seeds": [7],
        "trials": 2,
        "episodes": 6,
        "space": {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
    }


def sweep(folder: Path) -> Tree:
    run = {key: value for key, value in groups(folder).items() if key not in ("output_dir", "seed")}
    return {
        "output_dir": "run",
        "run_command": "grpo",
        "run": run,
        "grid": {"optimizer.learning_rate": [1e-3, 1e-2]},
        "metric": "reward/mean",
    }


def overoptimize(folder: Path) -> Tree:
    gold = {"kind": "length", "low": 4, "high": 20, "unit": "characters", "name": "gold"}
    proxy = {"kind": "length", "low": 40, "unit": "characters", "name": "proxy"}
    training = {"num_steps": 2, "episodes_per_step": 8, "algorithm": {"group_size": 4}}
    return {
        "output_dir": "run",
        "model": {"path": str(folder / "model")},
        "env": {"id": "text/Echo-v0", "kwargs": {"num_words": 4}},
        "gold": [gold],
        "rewards": [proxy],
        "rollout": {"max_new_tokens": 3},
        "best_of_n": {"prompts": 4, "samples": 8},
        "rl": {"seeds": 2, "measured": 4, "training": training},
    }


COMMANDS: dict[str, tuple[str, Callable[[Path], Tree]]] = {
    "sft": ("sft", sft),
    "sft-trl": ("sft", lambda folder: sft(folder, engine="trl")),
    "reward": ("reward", pairs),
    "dpo": ("dpo", pairs),
    "kto": ("kto", labels),
    "ppo": ("ppo", online),
    "grpo": ("grpo", groups),
    "evaluate": ("evaluate", evaluate),
    "run": ("run", pipeline),
    "bench": ("bench", bench),
    "tune": ("tune", tune),
    "sweep": ("sweep", sweep),
    "overoptimize": ("overoptimize", overoptimize),
}
"""Case -> command, and its configuration in a folder that contains a model."""


class Runs:
    """The runs of one command, each in a folder of its own."""

    def __init__(self, root: Path, case: str, model: Path) -> None:
        self.root = root
        self.command, make_tree = COMMANDS[case]
        root.mkdir()
        shutil.copytree(model, root / "model")
        (root / "hook").mkdir()
        (root / "hook/sitecustomize.py").write_text(HOOK)
        self.config = root / "config.yaml"
        self.config.write_text(yaml.safe_dump(make_tree(root)))
        self.operations = self.run("whole")
        assert self.operations is not None
        self.whole = files_of(root / "whole/run")

    def run(self, name: str, moment: int = 0) -> int | None:
        """Start or continue a run; return its file operations, None if a process was killed."""
        folder, counter = self.root / name, self.root / "counter"
        folder.mkdir(exist_ok=True)
        counter.unlink(missing_ok=True)
        arguments = [str(self.config)] if self.command in ("run", "bench", "tune", "sweep") else []
        arguments = arguments or ["--config", str(self.config)]
        process = subprocess.run(
            [sys.executable, "-m", "rlhf", self.command, *arguments, "--resume"],
            cwd=folder,
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(self.root / "hook"), str(ROOT)]),
                "KILL_FOLDER": str(folder / "run"),
                "KILL_COUNTER": str(counter),
                "KILL_MOMENT": str(moment),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        operations = counter.stat().st_size if counter.exists() else 0
        if 0 < moment <= operations:
            worker_died = "died" in process.stderr
            assert process.returncode == -signal.SIGKILL or worker_died, process.stderr[-2000:]
            return None
        assert process.returncode == 0, process.stderr[-2000:]
        return operations


UNCOMPARED = (
    ".lock", ".rlhf", "environment.json", "logs", "trainer_state.json", "time.csv", "optuna.log",
)  # fmt: skip
"""Processes, versions, dates and durations; transformers' own log, which has counters too; and
Optuna's journal, which has processes and dates (`trials.csv` has its trials)."""
MODEL_CARD = "checkpoints/README.md"
"""TRL writes its tags in the order of a set, which differs between processes."""
CLOCK = ("time", "seconds", "date", "trainer_state.json")
"""Fields that contain a duration or a date, also as the first part of a longer key; and the
checksum of that log."""


def files_of(folder: Path) -> dict[str, Any]:
    """Return the content of the files below a folder, without clock times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not set(name.parts) & set(UNCOMPARED):
            if str(name).endswith(MODEL_CARD):
                continue
            found[str(name)] = content_of(path)
    return found


def content_of(path: Path) -> Any:
    """Return the bytes of a file, or its JSON without clock times."""
    if path.suffix == ".json":
        return without_clock(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".html":
        return None  # drawn from the other files, with dates and durations in many places
    if path.suffix == ".tex":
        return None  # made from the CSV table beside it
    if path.suffix == ".csv":
        return table_without_clock(list(csv.reader(path.read_text().splitlines())))
    return path.read_bytes()


def table_without_clock(rows: list[list[str]]) -> list[list[str]]:
    """Return a table without the columns and rows of durations."""
    clock = [name.startswith("time/") for name in rows[0]]
    kept = [[v for v, drop in zip(row, clock, strict=True) if not drop] for row in rows]
    return [row for row in kept if not any(value.startswith("time/") for value in row)]


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k.split("/")[0] not in CLOCK}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    """Return the runs of a case, whose whole run is made once."""
    root = tmp_path_factory.mktemp("kills")
    model = save_model(root / "model")
    made: dict[str, Runs] = {}

    def runs(case: str) -> Runs:
        if case not in made:
            made[case] = Runs(root / case, case, model)
        return made[case]

    return runs


@pytest.mark.sweep
@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_ends_with_the_same_files(number: int, runs_of: Callable[[str], Runs]) -> None:
    case = list(COMMANDS)[number % len(COMMANDS)]
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    runs = runs_of(case)
    assert runs.operations is not None
    moment = random.Random(f"{seed} {number}").randrange(1, runs.operations + 1)
    print(f"KILL_SEED={seed}: {case} before operation {moment} of {runs.operations}")
    name = f"killed-{number}"
    assert runs.run(name, moment) is None
    runs.run(name)
    killed = files_of(runs.root / name / "run")
    assert killed.keys() == runs.whole.keys()
    assert [path for path in killed if killed[path] != runs.whole[path]] == []
