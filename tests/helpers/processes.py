"""Python processes that train together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Python with these arguments, from the repository."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a good end."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, "\n".join(x for x in errors.splitlines() if "rlhf:" in x)


def start_two(config: Path, command: str = "ppo", *options: str) -> list[subprocess.Popen[str]]:
    """Two processes without their launcher, so that they can be killed together."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    words = ("-m", "rlhf", command, "--config", str(config), *(options or ["--resume"]))
    return [start(*words, RANK=rank, LOCAL_RANK=rank, **where) for rank in "01"]


def steps_before(processes: list[subprocess.Popen[str]], log: Path, *, lines: int) -> None:
    """Wait until so many steps were logged."""
    while not (log.exists() and log.read_text().count("\n") >= lines):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
