"""Limit the effects of the code of users and third parties, and describe its errors."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from rlhf.common.signals import STOP_SIGNALS, StopSignal
from rlhf.common.text import mask_secrets
from rlhf.errors import UserError, message_of

_REPEAT_SECONDS = 1.0
"""Interval in seconds at which code that catches the first interruption is interrupted again."""
_TORCH_SETTINGS = {
    "get_default_dtype": "set_default_dtype",
    "get_num_threads": "set_num_threads",
}
"""Function of torch that returns a setting -> function that changes it."""
_AUTOCAST_DEVICES = ("cpu", "cuda")
end_process = os._exit
"""Ends the process at once, also while third-party code runs; see `exit_as_exception`."""
_ALARM = (signal.SIGALRM,) if hasattr(signal, "SIGALRM") else ()  # not on Windows
_MAX_MESSAGE_LENGTH = 160
"""Number of characters to which the message of a reported exception is truncated."""
_STDLIB = sysconfig.get_paths()["stdlib"]
_TOOLKIT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CodeLocation = tuple[str, int]
"""Path of a file, and number of a line."""
_DEFAULT_LOCATION = "_rlhf_location"
"""Attribute of an exception with its location if the traceback has no line of the user."""


def describe_exception(error: BaseException) -> str:
    """Describe an exception in one line: type, message, and a location (file and line).

    The location is that of `user_code_location`. If all lines are in installed packages or in this
    toolkit, it is the deepest line of the traceback. The message is truncated to
    `_MAX_MESSAGE_LENGTH` characters, and its secrets are masked.
    """
    frames = traceback.extract_tb(error.__traceback__)
    location = user_code_location(error)
    if location is None and frames:
        location = frames[-1].filename, frames[-1].lineno or 0
    # Masking a long text, such as a whole reply, takes seconds.
    text = error.msg if isinstance(error, SyntaxError) else message_of(error)
    message = mask_secrets(" ".join(text[: 10 * _MAX_MESSAGE_LENGTH].split()))
    message = f": {message[:_MAX_MESSAGE_LENGTH]}" if message else ""
    return f"{type(error).__name__}{message}{location_text(location)}"


def location_text(location: CodeLocation | None) -> str:
    """Return a location for a message, such as " (mine.py:3)"; "" for None."""
    return f" ({os.path.basename(location[0])}:{location[1]})" if location else ""


def set_default_location(error: BaseException, location: CodeLocation) -> None:
    """Set the result of `user_code_location` for an exception without a line in the user's code."""
    setattr(error, _DEFAULT_LOCATION, location)


def user_code_location(error: BaseException) -> CodeLocation | None:
    """Return file and line of an exception in the user's code; None if it has no line there.

    It is the deepest line of the traceback that is outside installed packages and outside this
    toolkit, because a user can change this line. For a syntax error, it is the line of the error.
    Without such a line, it is the location of the cause of the exception, or, without a cause, that
    of `set_default_location`.
    """
    if isinstance(error, SyntaxError) and error.filename and not is_library_file(error.filename):
        return error.filename, error.lineno or 0
    frames = traceback.extract_tb(error.__traceback__)
    lines = [(f.filename, f.lineno or 0) for f in frames if not is_library_file(f.filename)]
    if not lines and error.__cause__ is not None:
        # An example is the SystemExit that `ensure_ordinary_exceptions` sets as the cause.
        return user_code_location(error.__cause__)
    return lines[-1] if lines else getattr(error, _DEFAULT_LOCATION, None)


def is_library_file(path: str) -> bool:
    """Return whether a file is in this toolkit, an installed package or the standard library.

    Code without a file, whose path begins with ``<``, such as ``<string>``, counts as a library.
    """
    with contextlib.suppress(FileNotFoundError):  # the working directory was deleted
        path = os.path.abspath(path) if not path.startswith("<") else path
    folder = os.path.dirname(path)
    ours = folder == _TOOLKIT or folder.startswith(_TOOLKIT + os.sep)
    return ours or "site-packages" in path or path.startswith("<") or folder.startswith(_STDLIB)


class _SharedContext:
    """A context manager for a change of the whole process that several threads need at once.

    The first of several overlapping blocks makes the change, and the last one reverts it. Without
    this, a block that ends while another thread is in its own block would revert the change too
    early, and the other block would then restore the changed state for ever.

    Args:
        make_context: Function that returns the context manager that makes and reverts the change.
    """

    def __init__(self, make_context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._make, self._lock, self._blocks = make_context, threading.Lock(), 0
        self._context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._blocks:
                self._context = self._make()
                self._context.__enter__()
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if not self._blocks:
                    self._context.__exit__(None, None, None)


class _TimeLimitExceeded(BaseException):
    """Exception that is raised in a call that exceeds its time limit.

    The base class is BaseException, because the called code may catch every Exception.
    """


@contextlib.contextmanager
def limit_side_effects(timeout: float | None = None) -> Iterator[None]:
    """Return a context manager that limits the side effects of third-party code on this process.

    The standard output of the code is redirected to standard error; see `output_to_stderr`. The
    state of the process is restored afterwards; see `restored_process_state`. A process that the
    code forked ends here, because it would otherwise write to the same run directory.

    Args:
        timeout: Time limit in seconds; None means no limit. Native code that does not handle
            signals is interrupted only when it returns to Python.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and no handler records the signal.
        StopSignal: A handler raised it for a signal.
        RuntimeError: The code called ``sys.exit`` or ``os._exit``, or raised another BaseException
            that is not an Exception.
        TimeoutError: The code exceeded the time limit.
        UserError: A time limit is set, but signals are not available, because the system is not
            Unix or because the code does not run in the main thread.
    """
    with (
        output_to_stderr(),
        restored_process_state(),
        time_limit(timeout),
        ensure_ordinary_exceptions(),
        exit_as_exception(),
    ):
        yield


class _StreamWithoutClose:
    """Text stream whose method ``close`` only flushes it."""

    def __init__(self, stream: Any):
        self._stream = stream

    def close(self) -> None:
        self._stream.flush()

    def __enter__(self) -> _StreamWithoutClose:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _output_to_stderr() -> Iterator[None]:
    stream: Any = _StreamWithoutClose(sys.stderr)
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield


@contextlib.contextmanager
def ensure_ordinary_exceptions() -> Iterator[None]:
    """Return a context manager that converts other exceptions of third-party code to Exceptions.

    A process that the code forked ends here. The context manager can be used in any thread.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and no handler records the signal.
        StopSignal: A handler raised it for a signal.
        RuntimeError: The code called ``sys.exit``, or raised another BaseException that is not an
            Exception.
    """
    process = os.getpid()
    try:
        yield
    except (Exception, _TimeLimitExceeded, StopSignal):
        raise
    except SystemExit as error:
        raise RuntimeError(f"called sys.exit({error.code!r})") from error
    except BaseException as error:
        # Ctrl-C reaches the main thread. A handler such as that of `StopSignalRecorder` does not
        # raise KeyboardInterrupt. In all other cases, the code raised it.
        pressed = (
            isinstance(error, KeyboardInterrupt)
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
            and threading.current_thread() is threading.main_thread()
        )
        if pressed:
            raise
        raise RuntimeError(f"raised {type(error).__name__}: {message_of(error)}") from error
    finally:
        if os.getpid() != process:  # a forked process, which would continue the run a second time
            end_process(1)


@contextlib.contextmanager
def _exit_as_exception() -> Iterator[None]:
    process, previous = os.getpid(), os._exit

    def raise_exit(status: int) -> NoReturn:
        if os.getpid() != process:
            end_process(status)
        raise SystemExit(status)

    os._exit = raise_exit
    try:
        yield
    finally:
        os._exit = previous


output_to_stderr = _SharedContext(_output_to_stderr)
"""Context manager in which the standard output of this process is standard error, because standard
output is reserved for results. Closing one of the streams only flushes it, and a stream that the
code replaces is restored at the end, because the log of the run uses standard error."""
exit_as_exception = _SharedContext(_exit_as_exception)
"""Context manager in which ``os._exit`` raises SystemExit instead of ending a process. Without it,
code that calls ``os._exit(0)`` would end a run without a message and with the exit code of success.
Processes that the code forks can still end with ``os._exit``. In a thread, the exception ends only
the thread."""


@contextlib.contextmanager
def restored_process_state() -> Iterator[None]:
    """Return a context manager that restores the state of the process.

    The state is the working directory, the handlers of SIGALRM and of the signals that stop a run,
    the timer of SIGALRM if none was running, and torch's gradient mode, inference mode, autocast,
    default dtype and device, number of threads and precision of matrix products. Handlers and the
    timer are restored only in the main thread, which sets those of the toolkit.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    directory = None
    with contextlib.suppress(OSError):  # the working directory was removed
        directory = os.getcwd()
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, *_ALARM)}
    no_timer = in_main_thread and bool(_ALARM) and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    torch = sys.modules.get("torch")
    try:
        with _restored_torch_state(torch) if torch else contextlib.nullcontext():
            yield
    finally:
        if directory:
            os.chdir(directory)
        if no_timer:  # the signal of a timer that the code left would end the process
            signal.setitimer(signal.ITIMER_REAL, 0)
        if in_main_thread:
            for number, handler in handlers.items():
                if signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


@contextlib.contextmanager
def _restored_torch_state(torch: Any) -> Iterator[None]:
    """Return a context manager that restores the state of the module ``torch``."""
    grad_enabled, device = torch.is_grad_enabled(), torch.get_default_device()
    settings = {name: getattr(torch, name)() for name in _TORCH_SETTINGS}
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in _AUTOCAST_DEVICES}
    precision = _matmul_precision(torch)
    try:
        # The end of an inference mode context restores the previous mode, also if code inside it
        # did not leave its own context. The start enables gradients.
        with torch.inference_mode(torch.is_inference_mode_enabled()):
            torch.set_grad_enabled(grad_enabled)
            yield
    finally:
        torch.set_grad_enabled(grad_enabled)
        for name, value in settings.items():
            if getattr(torch, name)() != value:
                getattr(torch, _TORCH_SETTINGS[name])(value)
        for kind, enabled in autocast.items():
            torch.set_autocast_enabled(kind, enabled)
        if precision and _matmul_precision(torch) != precision:
            torch.set_float32_matmul_precision(precision)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)


def _matmul_precision(torch: Any) -> str | None:
    """Return the precision of matrix products; None if it was set for one backend only."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Return a context manager that raises TimeoutError in a block that exceeds a time limit.

    Args:
        seconds: The limit; None means no limit.

    Raises:
        TimeoutError: The block exceeded the limit.
        UserError: There is a limit, and the system is not Unix or this is not the main thread.
    """
    if seconds is None:
        yield
        return

    def expire(number: int, frame: object) -> None:
        raise _TimeLimitExceeded

    try:
        previous = signal.signal(signal.SIGALRM, expire)
    except (AttributeError, ValueError):
        raise UserError(
            "env.timeout can only be used on Unix and in the main thread: remove env.timeout"
        ) from None
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, _REPEAT_SECONDS)
        yield
    except _TimeLimitExceeded as error:
        # The traceback shows the line that was interrupted.
        timeout = TimeoutError(f"took longer than {seconds:g} s")
        raise timeout.with_traceback(error.__traceback__) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
