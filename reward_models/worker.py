"""Call a function in a separate process with a timeout, for scorers that may hang or crash.

``FunctionWorker`` starts a Python subprocess that runs ``serve``. Arguments and results are sent as
JSON Lines. A forked process of ``multiprocessing`` would be unsafe while threads run, and a spawned
one would need ``if __name__ == "__main__"`` in the caller's script.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from rlhf.common.foreign import describe_exception, time_limit
from rlhf.common.imports import import_object
from rlhf.common.plugins import load_plugins_of_parent
from rlhf.common.signals import STOP_SIGNALS
from rlhf.common.user_code import add_location_to_errors
from rlhf.errors import UserError
from rlhf.reward_models.core import SetupError, Unscorable

_START_SECONDS = 120.0  # time limit of the start, for imports of a large library on a busy machine
_GRACE_SECONDS = 2.0
"""Time after the limit in which a process can report the executed line before it is killed."""


class FunctionWorker:
    """Call a function in another process.

    The process is started at the first call. After a timeout or a crash, the next call starts a new
    process.

    Args:
        path: ``module:name`` of a function with JSON arguments and a JSON result.
        timeout: Time limit of a call, in seconds.

    Raises:
        UserError: ``timeout`` is not positive.
    """

    def __init__(self, path: str, *, timeout: float):
        if not timeout > 0:
            raise UserError(f"timeout must be > 0 seconds, got {timeout}")
        self.path, self.timeout = path, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function and return its result.

        Raises:
            Unscorable: The function raised an exception or exceeded the time limit, or the process
                crashed.
            SetupError: The function cannot be imported.
        """
        with self._lock:
            return self._call(arguments)

    def _call(self, arguments: tuple) -> Any:
        """Send the arguments to the process and return the result, see `__call__`."""
        process = self._running_or_new_process()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(arguments).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise Unscorable("the worker process died") from None
        answer = self._read_message(process, self.timeout, grace=_GRACE_SECONDS)
        if answer.get("expired"):
            self.close()
        if "error" in answer:
            raise Unscorable(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _running_or_new_process(self) -> subprocess.Popen[bytes]:
        """Return the process; start a process if none is running.

        Raises:
            SetupError: The function cannot be imported.
            Unscorable: The new process ended, or was not ready after `_START_SECONDS`.
        """
        if self._process is None or self._process.poll() is not None:
            # `-m` would import this module twice, because its package imports it.
            code = "import sys; from rlhf.reward_models.worker import serve; serve(*sys.argv[1:])"
            command = [sys.executable, "-c", code, self.path, str(self.timeout)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
            )
            greeting = self._read_message(self._process, _START_SECONDS)
            if "error" in greeting:
                self.close()
                raise SetupError(f"cannot load {self.path}: {greeting['error']}")
        return self._process

    def _read_message(
        self, process: subprocess.Popen[bytes], seconds: float, *, grace: float = 0.0
    ) -> dict[str, Any]:
        """Read one message from the process; kill the process if there is none.

        Raises:
            Unscorable: There is no message after ``seconds + grace``, or the process has ended.
        """
        assert process.stdout is not None
        deadline, line = time.monotonic() + seconds + grace, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select(
                [process.stdout], [], [], max(0.0, deadline - time.monotonic())
            )
            chunk = process.stdout.read(65536) if ready else None
            if not chunk:
                self.close()
                late = f"TimeoutError: took longer than {seconds:g} s"
                raise Unscorable("process died" if ready else late)
            line += chunk
        return json.loads(line)


def serve(function_path: str, timeout: str) -> None:
    """Call the function at ``function_path`` with the arguments in each line of standard input.

    Results are written to standard output. Text that the function prints is redirected to standard
    error. A call that takes longer than ``timeout`` seconds is interrupted.
    """
    # Ctrl-C and schedulers send signals to every process. This process ignores these signals,
    # because the run needs scores until its current step ends.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**content: Any) -> None:
        results.write(json.dumps(content, default=_to_json_value) + "\n")
        results.flush()

    try:
        load_plugins_of_parent()
        function = import_object(function_path, what="the function of a reward")
    except UserError as error:
        reply(error=str(error))
        return
    reply(result="ready")
    for line in sys.stdin:
        try:
            with add_location_to_errors(function), time_limit(float(timeout)):
                result = function(*json.loads(line))
                json.dumps(result, default=_to_json_value)
        except (Exception, SystemExit) as error:  # a failure of the user's function
            reply(error=describe_exception(error), expired=isinstance(error, TimeoutError))
        else:
            reply(result=result)


def _to_json_value(value: Any) -> Any:
    """Convert a value that JSON does not have: a number or array of numpy, torch or pandas.

    Raises:
        TypeError: The value cannot be converted.
    """
    try:
        return value.tolist() if hasattr(value, "tolist") else float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"a value of type {type(value).__name__} cannot be passed between processes: return a "
            "list of numbers"
        ) from None
