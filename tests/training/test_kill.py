"""A run killed at any moment ends like the run that never stopped, bit for bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from tests.helpers.training import metrics_of, online_tree, same, weights_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def start(config: Path) -> subprocess.Popen[str]:
    """The run in a process of its own, continued if it was begun."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlhf", "ppo", "--config", str(config), "--resume"]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def config_of(folder: Path, model: Path) -> Path:
    folder.mkdir()
    tree = online_tree(folder / "run", model, num_steps=STEPS, save_every=2)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def finish(config: Path) -> Path:
    process = start(config)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return config.parent / "run"


def kill_after(config: Path, lines: int, delay: float) -> None:
    """Kill -9 a moment after so many lines were logged."""
    process = start(config)
    log = config.parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") >= lines:
            time.sleep(delay)
            process.kill()
            break
        time.sleep(0.005)
    process.kill()
    process.communicate()


def test_a_killed_run_ends_like_the_whole_run(tmp_path: Path, echo_model: Path) -> None:
    seed = random.randrange(10**6)
    print(f"moments drawn with seed {seed}")
    rng = random.Random(seed)
    whole = finish(config_of(tmp_path / "whole", echo_model))
    config = config_of(tmp_path / "killed", echo_model)
    for lines in (1, 5, 9):
        kill_after(config, lines, rng.uniform(0.0, 0.1))
    killed = finish(config)
    assert metrics_of(killed) == metrics_of(whole)
    assert len(metrics_of(killed)) == STEPS
    assert same(weights_of(killed), weights_of(whole))
    name = f"checkpoints/step-{STEPS}/optimizer.pt"
    assert same(torch.load(killed / name), torch.load(whole / name))
    samples = [(run / "samples.jsonl").read_text() for run in (killed, whole)]
    assert samples[0] == samples[1]
