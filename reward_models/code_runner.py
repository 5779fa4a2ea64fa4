"""Rewards for programs: run the code of a reply against tests in a sandboxed process."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import UserError
from rlhf.reward_models.core import (
    Conversation,
    EachReward,
    Reward,
    SetupError,
    Unscorable,
    last_reply,
)
from rlhf.reward_models.fences import code_in
from rlhf.reward_models.targets import Target

_POLL_SECONDS = 0.05
_MAX_FILES = 1000
_COMMAND = [sys.executable, "-I", "-B", str(Path(__file__).with_name("sandbox.py"))]


@dataclass(frozen=True)
class Outcome:
    """Result of running a program."""

    status: str
    """``passed``; ``failed`` (an exception, or an exit before the end of the tests); ``cpu``,
    ``output`` or ``disk`` (stopped at that limit); ``deadline`` (wall-clock limit)."""
    output: str
    """Output to stdout and stderr, up to the limit."""
    seconds: float
    """Wall-clock time."""


@dataclass(frozen=True)
class CodeRunner:
    """Runs Python programs under limits that the kernel enforces; see ``sandbox``.

    The constructor fails on a host that cannot enforce a limit, unless ``allow_unenforced`` is set;
    then only the other limits apply.

    Raises:
        UserError: A limit is not positive, or the host cannot enforce it.
    """

    cpu_seconds: int = 5
    """CPU time."""
    wall_seconds: float = 20.0
    """Wall-clock time; longer than the CPU time, because the machine may be busy."""
    memory_mb: int = 512
    """Address space of the process, including the interpreter, in MiB."""
    disk_mb: int = 16
    """Size of the working directory, in MiB."""
    output_kb: int = 64
    """Size of the output, in KiB."""
    allow_unenforced: bool = False
    """Run even if a limit cannot be enforced."""

    def __post_init__(self) -> None:
        limits = (self.cpu_seconds, self.wall_seconds, self.memory_mb, self.disk_mb, self.output_kb)
        if min(limits) <= 0:
            raise UserError(f"code: every limit must be > 0, got {limits}")
        if self.memory_mb < 64:
            raise UserError(
                f"code: memory_mb must be >= 64 (Python needs that), got {self.memory_mb}"
            )
        if not self.allow_unenforced:
            self.run("pass")

    def run(self, code: str, tests: str = "") -> Outcome:
        """Run ``code``, then ``tests`` in the same module; the tests pass if nothing raises.

        Raises:
            SetupError: The host cannot enforce a limit.
        """
        started, token = time.monotonic(), secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="code-") as folder:
            with self._start(folder) as process:
                try:
                    self._send(process, folder, code=code, tests=tests, token=token)
                    status, output = self._watch(process, Path(folder), started)
                finally:
                    _kill(process)
            exit_code = process.returncode
        first, _, text = output.partition(b"\n")
        if status == "deadline" and not first:
            return Outcome(status, "", time.monotonic() - started)
        self._check_enforced(first)
        passed = text.endswith(token.encode())
        text = text.removesuffix(token.encode())
        if status == "ended":
            over_cpu = exit_code in (-signal.SIGXCPU, -signal.SIGKILL)
            status = "passed" if passed else "cpu" if over_cpu else "failed"
        return Outcome(status, text.decode(errors="replace"), time.monotonic() - started)

    def _start(self, folder: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
            bufsize=0,
        )

    def _send(self, process: subprocess.Popen[bytes], folder: str, **task: str) -> None:
        assert process.stdin is not None
        limits = {
            "folder": folder,
            "cpu": self.cpu_seconds,
            "memory": self.memory_mb << 20,
            "disk": self.disk_mb << 20,
        }
        content = {"limits": limits, "allow_unenforced": self.allow_unenforced, **task}
        process.stdin.write(json.dumps(content).encode() + b"\n")
        process.stdin.close()

    def _watch(
        self, process: subprocess.Popen[bytes], folder: Path, started: float
    ) -> tuple[str, bytes]:
        """Collect output until the process ends or exceeds a limit that is checked here."""
        assert process.stdout is not None
        output = b""
        while True:
            ready, _, _ = select.select([process.stdout], [], [], _POLL_SECONDS)
            if ready:
                chunk = os.read(process.stdout.fileno(), 65536)
                output += chunk
                if len(output) > self.output_kb << 10:
                    return "output", output[: self.output_kb << 10]
                if not chunk:
                    return self._reap(process, started), output
            if _size(folder) > self.disk_mb << 20:
                return "disk", output
            if time.monotonic() - started > self.wall_seconds:
                return "deadline", output

    def _reap(self, process: subprocess.Popen[bytes], started: float) -> str:
        """Wait for a process that has closed its output but may still run."""
        try:
            process.wait(max(0.0, started + self.wall_seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "deadline"
        return "ended"

    def _check_enforced(self, first_line: bytes) -> None:
        failed = json.loads(first_line) if first_line.startswith(b"{") else {"sandbox": "no start"}
        if failed and not self.allow_unenforced:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise SetupError(
                f"this host cannot confine programs ({reasons}); run code rewards elsewhere, or "
                "accept the risk with allow_unenforced: true"
            )


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _size(folder: Path) -> int:
    """Size of all files in ``folder`` in bytes; `sys.maxsize` for more than 1000 files."""
    total = files = 0
    for root, _, names in os.walk(folder):
        files += len(names)
        if files > _MAX_FILES:
            return sys.maxsize
        for name in names:
            path = os.path.join(root, name)
            if os.path.lexists(path):
                total += os.lstat(path).st_size
    return total


def code(
    tests: str | None = None,
    answers: str | None = None,
    cpu_seconds: int = 5,
    wall_seconds: float = 20.0,
    memory_mb: int = 512,
    allow_unenforced: bool = False,
) -> Reward:
    """1.0 if the code of the reply passes its tests, else 0.0.

    Code that exceeds its CPU, memory, output or disk limit fails. Code that exceeds the wall-clock
    limit has no score, because the machine may have been busy.

    Args:
        tests: Python source that raises if the program is wrong. Without it, the tests are the fact
            ``tests`` of the conversation or the column ``tests`` of ``answers``.
        answers: JSONL file with ``prompt`` and ``tests``.
        cpu_seconds: Limit of the CPU time.
        wall_seconds: Limit of the wall-clock time.
        memory_mb: Limit of the memory, in MiB.
        allow_unenforced: Run even if the host cannot enforce a limit.
    """
    target = Target(tests, answers, key="tests")
    runner = CodeRunner(
        cpu_seconds=cpu_seconds,
        wall_seconds=wall_seconds,
        memory_mb=memory_mb,
        allow_unenforced=allow_unenforced,
    )

    def check(conversation: Conversation) -> float:
        program, checks = code_in(last_reply(conversation)), target.of(conversation)
        outcome = runner.run(program, checks)
        if outcome.status == "deadline":
            raise Unscorable(f"deadline of {wall_seconds:g} s")
        return float(outcome.status == "passed")

    return EachReward(check, name="code")
