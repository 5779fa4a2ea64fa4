"""Two processes do what one does: same gradients, same metrics, one run directory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from rlhf.training.distributed import World
from tests.training.workbench import checkpoint_of, metrics_of, online_tree, read_rows, same

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("time", "time/rollout", "time/score", "time/learn")


def test_a_world_of_one_changes_nothing() -> None:
    world = World()
    assert world.map([3, 1, 2], lambda part: [10 * x for x in part]) == [30, 10, 20]
    assert world.mine(["a", "b"]) == ["a", "b"]
    assert world.gather("x") == ["x"]


def test_shares_are_disjoint_and_complete() -> None:
    parts = list(range(7))
    shares = [World(rank, 3).mine(parts) for rank in range(3)]
    assert sorted(x for share in shares for x in share) == parts


def launch(
    folder: Path, model: Path, *, processes: int, resume: bool = False, **keys: Any
) -> subprocess.Popen[str]:
    """A short PPO run on so many processes, in a process group of its own."""
    config = folder / "ppo.yaml"
    tree = online_tree(
        folder / "run",
        model,
        micro_batch_tokens=96,
        algorithm={"num_minibatches": 2, "num_epochs": 2},
        **keys,
    )
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "rlhf.cli", "ppo", "--config", str(config)]
    command += ["--resume"] if resume else []
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, "--master_port", port, *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run_ppo(folder: Path, model: Path, **how: Any) -> list[dict[str, Any]]:
    """Metrics of a run that goes to its end."""
    process = launch(folder, model, **how)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, "\n".join(x for x in errors.splitlines() if "rlhf:" in x)
    return read_rows(folder / "run" / "metrics.jsonl")


def kill_after(folder: Path, model: Path, *, lines: int, **how: Any) -> None:
    """Kill -9 all processes of a run once so many lines were logged."""
    process = launch(folder, model, **how)
    log = folder / "run/metrics.jsonl"
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") >= lines:
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_two_processes_train_as_one(tmp_path: Path, echo_model: Path) -> None:
    one = run_ppo(tmp_path / "one", echo_model, processes=1, num_steps=2)
    two = run_ppo(tmp_path / "two", echo_model, processes=2, num_steps=2)
    assert [row["step"] for row in two] == [1, 2]
    for alone, shared in zip(one, two, strict=True):
        for key in alone.keys() - set(TIMES):
            torch.testing.assert_close(shared[key], alone[key], rtol=1e-3, atol=2e-5, msg=key)
    weights = [
        torch.load(tmp_path / name / "run/checkpoints/step-2/weights.pt")["model"]
        for name in ("one", "two")
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6)
    assert len(list((tmp_path / "two/run/evaluation/run").glob("episodes.jsonl"))) == 1


def test_two_killed_processes_end_like_two_that_were_not(tmp_path: Path, echo_model: Path) -> None:
    how: dict[str, Any] = {"processes": 2, "num_steps": 8, "save_every": 2}
    run_ppo(tmp_path / "whole", echo_model, **how)
    kill_after(tmp_path / "cut", echo_model, lines=3, **how)
    assert 3 <= len(metrics_of(tmp_path / "cut/run")) < 8
    run_ppo(tmp_path / "cut", echo_model, resume=True, **how)
    runs = [tmp_path / name / "run" for name in ("whole", "cut")]
    assert metrics_of(runs[0]) == metrics_of(runs[1])
    assert len(metrics_of(runs[0])) == 8
    assert same(checkpoint_of(runs[0]), checkpoint_of(runs[1]))
