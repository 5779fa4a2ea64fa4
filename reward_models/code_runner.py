"""Rewards for programs: run the code in a reply and its tests in two confined processes."""

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

from rlhf.common.fences import code_of_reply
from rlhf.errors import UserError
from rlhf.reward_models.core import (
    Conversation,
    PerConversationReward,
    Reward,
    SetupError,
    Unscorable,
    last_reply,
)
from rlhf.reward_models.program_tests import join_and_check_tests
from rlhf.reward_models.sandbox.channel import PROGRAM_ENDED
from rlhf.reward_models.targets import ReferenceAnswerSource

_POLL_SECONDS = 0.05
_MAX_THREADS = 64
_FOLDER = str(Path(__file__).parent)
_START = (
    "import sys; sys.path.insert(0, {!r}); from sandbox.{} import main; del sys.path[0]; main()"
)
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class CodeRunResult:
    """Result of running a program."""

    status: str
    """``passed``; ``failed`` if an exception was raised, or the program exited before the tests
    finished; ``cpu``, ``output`` or ``threads`` if the limit of this name was exceeded;
    ``deadline`` if the wall-clock limit was exceeded."""
    output: str
    """Output of the program to stdout and stderr, followed by the output of the tests. It is
    truncated at the limit of the output."""
    seconds: float
    """Wall-clock time, in seconds."""


@dataclass(frozen=True)
class CodeRunner:
    """Run Python programs and their tests in two confined processes.

    ``sandbox.confinement`` lists the restrictions, and ``docs/security.md`` describes the
    protection. If the host cannot enforce a limit, the constructor raises an error. With
    ``allow_unenforced``, no error is raised, and only the limits that can be enforced apply.

    Raises:
        UserError: A limit is too small, or the host cannot enforce a limit.
    """

    cpu_seconds: int = 5
    """Limit of the CPU time of each process, in seconds."""
    wall_seconds: float = 20.0
    """Limit of the wall-clock time of a run, in seconds. The default is longer than the CPU time,
    because the machine may be busy."""
    memory_mb: int = 512
    """Limit of the address space of each process, including the interpreter, in MiB."""
    output_kb: int = 1024
    """Limit of the output of both processes together, in KiB."""
    allow_unenforced: bool = False
    """Whether to run programs even if a limit cannot be enforced."""

    def __post_init__(self) -> None:
        limits = (self.cpu_seconds, self.wall_seconds, self.memory_mb, self.output_kb)
        if min(limits) <= 0:
            raise UserError(f"code: every limit must be > 0, got {limits}")
        if self.memory_mb < 64:
            raise UserError(
                f"code: memory_mb must be at least 64, which Python needs, got {self.memory_mb}"
            )
        if not self.allow_unenforced:
            self.run("pass")

    def run(self, code: str, tests: str = "") -> CodeRunResult:
        """Run ``code``, then ``tests``; the tests pass if they end without an exception.

        Args:
            code: Python source of the program.
            tests: Python source of the tests, which use the names of the program.

        Raises:
            SetupError: The host cannot enforce a limit.
        """
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            ends = [stack.enter_context(end) for end in socket.socketpair()]
            program = stack.enter_context(self._start_process("program", ends[0], code=code))
            checker = stack.enter_context(self._start_process("checker", ends[1], tests=tests))
            for end in ends:
                end.close()
            status = self._wait_for_tests_within_limits(
                program, checker, started + self.wall_seconds
            )
        # A process may be killed before it writes its report. The process that wrote a report is
        # checked first, because its report may contain the reason.
        for process in sorted(
            (program, checker), key=lambda process: not process.restriction_report
        ):
            if process.restriction_report or status in ("passed", "failed", "cpu"):
                self._require_restrictions_enforced(process.restriction_report)
        output = b"".join(process.output_after_report() for process in (program, checker))
        text = output[: self.output_kb << 10].decode(errors="replace")
        return CodeRunResult(status, text, time.monotonic() - started)

    def _start_process(
        self, role: str, socket_end: socket.socket, **content: str
    ) -> _SandboxProcess:
        """Start one of the two processes.

        Args:
            role: "program" or "checker".
            socket_end: The process's end of the socket pair.
            **content: ``code`` of the program, or ``tests``.
        """
        limits = {"cpu": self.cpu_seconds, "memory": self.memory_mb << 20, "parent": os.getpid()}
        task = {"limits": limits, "allow_unenforced": self.allow_unenforced, **content}
        return _SandboxProcess(role, socket_end, task)

    def _wait_for_tests_within_limits(
        self, program: _SandboxProcess, checker: _SandboxProcess, deadline: float
    ) -> str:
        """Collect output until the tests end or a limit is exceeded; return the status.

        This method enforces the limits of output, threads and wall-clock time. The kernel enforces
        the other limits.
        """
        with selectors.DefaultSelector() as selector:
            for process in (program, checker):
                selector.register(process.stdout, selectors.EVENT_READ, process)
            while time.monotonic() < deadline:
                for key, _ in selector.select(_POLL_SECONDS):
                    if key.data.append_output_unless_ended():
                        continue
                    selector.unregister(key.fileobj)
                    if key.data is checker:
                        return self._final_status(program, checker, deadline)
                if len(program.output) + len(checker.output) > self.output_kb << 10:
                    return "output"
                if program.num_threads() > _MAX_THREADS:
                    return "threads"
        return "deadline"

    def _final_status(
        self, program: _SandboxProcess, checker: _SandboxProcess, deadline: float
    ) -> str:
        """Return the status of the run; called when the checker has closed its output.

        This method waits until ``deadline`` at most. If the program ended before its tests, the
        exit code of the program determines the status.
        """
        exit_code = checker.wait(deadline)
        if exit_code == PROGRAM_ENDED:
            # The exit code of the program shows whether it exceeded a limit. Unfinished tests count
            # as failed even if this exit code is 0.
            exit_code = program.wait(min(deadline, time.monotonic() + 1.0)) or PROGRAM_ENDED
        if exit_code is None:
            return "deadline"
        over_cpu = exit_code in (-signal.SIGXCPU, -signal.SIGKILL)
        return "passed" if exit_code == 0 else "cpu" if over_cpu else "failed"

    def _require_restrictions_enforced(self, report: bytes) -> None:
        """Raise SetupError if a process could not apply a restriction that must be enforced."""
        no_report = {"sandbox": "the process did not start"}
        failed = json.loads(report) if report.startswith(b"{") else no_report
        if failed and not self.allow_unenforced:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise SetupError(
                f"this host cannot confine programs ({reasons}); run code rewards elsewhere, or "
                "accept the risk with allow_unenforced: true"
            )


class _SandboxProcess:
    """One of the two processes with its output. The end of the ``with`` block kills the process.

    Args:
        role: Module of ``sandbox`` that the process runs: "program" or "checker".
        end: End of the socket pair that the process inherits.
        task: JSON object that the process receives on stdin.
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

    def __enter__(self) -> _SandboxProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self.append_output_unless_ended()
        self.stdout.close()

    @property
    def restriction_report(self) -> bytes:
        """First line of the output: JSON object of restrictions that failed -> error."""
        return self.output.partition(b"\n")[0]

    def output_after_report(self) -> bytes:
        """Return the output after the first line."""
        return self.output.partition(b"\n")[2]

    def append_output_unless_ended(self) -> bool:
        """Wait for output and append up to 64 KiB of it; return False at the end of the stream."""
        chunk = os.read(self.stdout.fileno(), 65536)
        self.output += chunk
        return bool(chunk)

    def num_threads(self) -> int:
        """Return the number of threads; 0 if it is unknown or the process has ended."""
        try:
            return len(os.listdir(f"/proc/{self._process.pid}/task"))
        except OSError:
            return 0

    def wait(self, deadline: float) -> int | None:
        """Wait for the process to exit.

        Returns:
            The exit code; None if the process still runs at ``deadline`` (`time.monotonic`).
        """
        try:
            return self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None


def code(
    tests: str | list[str] | None = None,
    answers: str | None = None,
    cpu_seconds: int = 5,
    wall_seconds: float = 20.0,
    memory_mb: int = 512,
    allow_unenforced: bool = False,
) -> Reward:
    """Build a reward of 1.0 if the code in the reply passes the tests, else 0.0.

    Code that exceeds a limit of CPU time, memory, threads or output fails. Code that exceeds the
    wall-clock limit has no score, because the machine may have been busy. There is also no score if
    the tests are not Python source, or cannot fail (see `program_tests.why_tests_cannot_fail`).

    Args:
        tests: Python source that raises an exception if the program is wrong, or a list of such
            sources, all of which must pass. By default, the tests are read from ``answers``, or
            else from the key ``tests`` of a message.
        answers: JSON Lines file with ``prompt`` and ``tests`` in each row.
        cpu_seconds: Limit of the CPU time of each process, in seconds.
        wall_seconds: Limit of the wall-clock time, in seconds.
        memory_mb: Limit of the address space of each process, in MiB.
        allow_unenforced: Whether to run programs even if the host cannot enforce a limit.

    Raises:
        UserError: A limit is too small, or the host cannot enforce one.
    """
    source = [*tests] if isinstance(tests, list) else tests
    target = ReferenceAnswerSource(source, answers, key="tests")
    runner = CodeRunner(
        cpu_seconds=cpu_seconds,
        wall_seconds=wall_seconds,
        memory_mb=memory_mb,
        allow_unenforced=allow_unenforced,
    )

    def score_reply(conversation: Conversation) -> float:
        program, checks = (
            code_of_reply(last_reply(conversation)),
            join_and_check_tests(target.reference_answers(conversation)),
        )
        outcome = runner.run(program, checks)
        if outcome.status == "deadline":
            raise Unscorable(f"exceeded the wall-clock limit of {wall_seconds:g} s")
        return float(outcome.status == "passed")

    return PerConversationReward(score_reply, name="code", outcomes=(0.0, 1.0), waits=True)
