"""A run killed before any of its file operations ends like a whole run, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.training import metrics_of, online_tree, same, weights_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12

KILLED_RUN = """
import os, signal, sys

folder, moment = sys.argv[1], int(sys.argv[2])
operations = 0

def count(event, arguments):
    global operations
    changes = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if (changes or writes) and str(arguments[0]).startswith(folder):
        operations += 1
        if operations == moment:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
from rlhf.cli.main import main
code = main(sys.argv[3:])
print(operations)
raise SystemExit(code)
"""
"""`rlhf`, killed just before the given file operation below a folder; 0 is never."""


def run(config: Path, moment: int = 0) -> int | None:
    """Start or continue the run; returns its number of file operations, None if it was killed."""
    folder = config.parent / "run"
    command = ["ppo", "--config", str(config), "--resume"]
    process = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(folder), str(moment), *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if process.returncode == -signal.SIGKILL:
        return None
    assert process.returncode == 0, process.stderr[-2000:]
    return int(process.stdout.splitlines()[-1])


def config_of(folder: Path, model: Path) -> Path:
    folder.mkdir()
    tree = online_tree(folder / "run", model, num_steps=STEPS, save_every=2)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_a_killed_run_ends_like_the_whole_run(tmp_path: Path, echo_model: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    whole = config_of(tmp_path / "whole", echo_model)
    operations = run(whole)
    assert operations is not None
    assert operations > 3 * STEPS
    config = config_of(tmp_path / "killed", echo_model)
    moments = [rng.randrange(1, operations // 3) for _ in range(3)]
    print(f"killed before operations {moments} of {operations}")
    assert [run(config, moment) for moment in moments] == [None] * 3
    run(config)
    runs = [path.parent / "run" for path in (config, whole)]
    metrics = [metrics_of(path) for path in runs]
    assert metrics[0] == metrics[1]
    assert len(metrics[0]) == STEPS
    assert same(*map(weights_of, runs))
    states = [torch.load(path / f"checkpoints/step-{STEPS}/optimizer.pt") for path in runs]
    assert same(*states)
    samples = [(path / "samples.jsonl").read_text() for path in runs]
    assert samples[0] == samples[1]
