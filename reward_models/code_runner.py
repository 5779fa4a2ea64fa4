"""Rewards for programs: run the code of a reply and its tests in two confined processes."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from rlhf.reward_models.sandbox.channel import PROGRAM_ENDED
from rlhf.reward_models.targets import Target

_POLL_SECONDS = 0.05
_MAX_THREADS = 64
_FOLDER = str(Path(__file__).parent)
_START = (
    "import sys; sys.path.insert(0, {!r}); from sandbox.{} import main; del sys.path[0]; main()"
)
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """Result of running a program."""

    status: str
    """``passed``; ``failed`` (an exception, or an end before the end of the tests); ``cpu``,
    ``output`` or ``threads`` (stopped at that limit); ``deadline`` (wall-clock limit)."""
    output: str
    """Output of the program to stdout and stderr, then that of the tests, up to the limit."""
    seconds: float
    """Wall-clock time."""


@dataclass(frozen=True)
class CodeRunner:
    """Runs Python programs and their tests in two processes under limits of the kernel.

    ``sandbox.confinement`` lists the restrictions, and ``docs/security.md`` describes the
    protection. The constructor fails on a host that cannot enforce a limit, unless
    ``allow_unenforced`` is set; then only the other limits apply.

    Raises:
        UserError: A limit is not positive, or the host cannot enforce it.
    """

    cpu_seconds: int = 5
    """CPU time of each process."""
    wall_seconds: float = 20.0
    """Wall-clock time; longer than the CPU time, because the machine may be busy."""
    memory_mb: int = 512
    """Address space of each process, including the interpreter, in MiB."""
    output_kb: int = 1024
    """Size of the output, in KiB."""
    allow_unenforced: bool = False
    """Run even if a limit cannot be enforced."""

    def __post_init__(self) -> None:
        limits = (self.cpu_seconds, self.wall_seconds, self.memory_mb, self.output_kb)
        if min(limits) <= 0:
            raise UserError(f"code: every limit must be > 0, got {limits}")
        if self.memory_mb < 64:
            raise UserError(
                f"code: memory_mb must be >= 64 (Python needs that), got {self.memory_mb}"
            )
        if not self.allow_unenforced:
            self.run("pass")

    def run(self, code: str, tests: str = "") -> Outcome:
        """Run ``code``, then ``tests``; the tests pass if they end without an exception.

        Raises:
            SetupError: The host cannot enforce a limit.
        """
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            ends = [stack.enter_context(end) for end in socket.socketpair()]
            program = stack.enter_context(self._start("program", ends[0], code=code))
            checker = stack.enter_context(self._start("checker", ends[1], tests=tests))
            for end in ends:
                end.close()
            status = self._watch(program, checker, started + self.wall_seconds)
        # If a process was ended before its report, the report of the other process may have the
        # reason.
        for process in sorted((program, checker), key=lambda process: not process.report):
            if process.report or status in ("passed", "failed", "cpu"):
                self._check_enforced(process.report)
        output = b"".join(process.text() for process in (program, checker))
        text = output[: self.output_kb << 10].decode(errors="replace")
        return Outcome(status, text, time.monotonic() - started)

    def _start(self, role: str, end: socket.socket, **content: str) -> _Process:
        limits = {"cpu": self.cpu_seconds, "memory": self.memory_mb << 20, "parent": os.getpid()}
        task = {"limits": limits, "allow_unenforced": self.allow_unenforced, **content}
        return _Process(role, end, task)

    def _watch(self, program: _Process, checker: _Process, deadline: float) -> str:
        """Collect output until the tests end or a limit that is checked here is exceeded."""
        with selectors.DefaultSelector() as selector:
            for process in (program, checker):
                selector.register(process.stdout, selectors.EVENT_READ, process)
            while time.monotonic() < deadline:
                for key, _ in selector.select(_POLL_SECONDS):
                    if key.data.read():
                        continue
                    selector.unregister(key.fileobj)
                    if key.data is checker:
                        return self._status(program, checker, deadline)
                if len(program.output) + len(checker.output) > self.output_kb << 10:
                    return "output"
                if program.num_threads() > _MAX_THREADS:
                    return "threads"
        return "deadline"

    def _status(self, program: _Process, checker: _Process, deadline: float) -> str:
        """Return the status after the checker has closed its output."""
        exit_code = checker.wait(deadline)
        if exit_code == PROGRAM_ENDED:
            # The exit code shows an exceeded limit; unfinished tests fail even if the exit code is
            # 0.
            exit_code = program.wait(min(deadline, time.monotonic() + 1.0)) or PROGRAM_ENDED
        if exit_code is None:
            return "deadline"
        over_cpu = exit_code in (-signal.SIGXCPU, -signal.SIGKILL)
        return "passed" if exit_code == 0 else "cpu" if over_cpu else "failed"

    def _check_enforced(self, report: bytes) -> None:
        failed = json.loads(report) if report.startswith(b"{") else {"sandbox": "no start"}
        if failed and not self.allow_unenforced:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise SetupError(
                f"this host cannot confine programs ({reasons}); run code rewards elsewhere, or "
                "accept the risk with allow_unenforced: true"
            )


class _Process:
    """One of the two processes and its output so far; the process ends with the context.

    Args:
        role: Module of ``sandbox``: "program" or "checker".
        end: End of the socket pair for this process.
        task: Task that the process receives on stdin.
    """

    def __init__(self, role: str, end: socket.socket, task: dict[str, Any]):
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _START.format(_FOLDER, role)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=_ENVIRONMENT,
            pass_fds=(end.fileno(),),
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdout = self._process.stdout
        self.output = b""
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(task | {"channel": end.fileno()}).encode())

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self.read()
        self.stdout.close()

    @property
    def report(self) -> bytes:
        """The first line of output: restrictions that failed, as JSON."""
        return self.output.partition(b"\n")[0]

    def text(self) -> bytes:
        """The output after the first line."""
        return self.output.partition(b"\n")[2]

    def read(self) -> bool:
        """Read available output; return False at its end."""
        chunk = os.read(self.stdout.fileno(), 65536)
        self.output += chunk
        return bool(chunk)

    def num_threads(self) -> int:
        """Number of threads; 0 if unknown or if the process has ended."""
        try:
            return len(os.listdir(f"/proc/{self._process.pid}/task"))
        except OSError:
            return 0

    def wait(self, deadline: float) -> int | None:
        """Wait for the process; return its exit code, or None if it still runs at the deadline."""
        try:
            return self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None


def code(
    tests: str | None = None,
    answers: str | None = None,
    cpu_seconds: int = 5,
    wall_seconds: float = 20.0,
    memory_mb: int = 512,
    allow_unenforced: bool = False,
) -> Reward:
    """Reward 1.0 if the code in the reply passes its tests, else 0.0.

    Code that exceeds its limit of CPU time, memory, threads or output fails. Code that exceeds the
    wall-clock limit has no score, because the machine may have been busy.

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
