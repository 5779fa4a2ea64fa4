"""Limit the effects of user code or third-party code, such as environments, rewards and judges."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from rlhf.errors import UserError, message_of

_REPEAT_SECONDS = 1.0
"""Interval in seconds at which code that catches the first interruption is interrupted again."""


class _Expired(BaseException):
    """Exception that is raised in a call that exceeds its time limit.

    The base class is BaseException, because the called code may catch every Exception.
    """


@contextlib.contextmanager
def limit_side_effects(timeout: float | None = None) -> Iterator[None]:
    """Return a context manager that limits the side effects of third-party code on this process.

    The standard output of the code is redirected to standard error, because standard output is
    reserved for results. The working directory, and torch's gradient mode and default dtype, are
    restored afterwards. A process that the code forked ends here, because it would otherwise write
    to the same run directory.

    Args:
        timeout: Time limit in seconds; None means no limit. Native code that does not handle
            signals is interrupted only when it returns to Python.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and no handler records the signal.
        RuntimeError: The code called ``sys.exit``, or raised another BaseException that is not an
            Exception.
        TimeoutError: The code exceeded the time limit.
        UserError: A time limit is set, but signals are not available, because the system is not
            Unix or because the code does not run in the main thread.
    """
    with contextlib.redirect_stdout(sys.stderr), _time_limit(timeout), _restored_state():
        try:
            yield
        except (Exception, _Expired):
            raise
        except SystemExit as error:
            raise RuntimeError(f"called sys.exit({error.code!r})") from error
        except BaseException as error:
            # A handler such as that of `StopRequest` does not raise KeyboardInterrupt, so the code
            # raised it.
            handler = signal.getsignal(signal.SIGINT)
            if isinstance(error, KeyboardInterrupt) and handler is signal.default_int_handler:
                raise
            raise RuntimeError(f"raised {type(error).__name__}: {message_of(error)}") from error


@contextlib.contextmanager
def _restored_state() -> Iterator[None]:
    """Return a context manager that restores the state of the process, and ends forked processes.

    The working directory, and torch's gradient mode and default dtype, are restored.
    """
    process, torch = os.getpid(), sys.modules.get("torch")
    directory = None
    with contextlib.suppress(OSError):  # the working directory was removed
        directory = os.getcwd()
    settings = (torch.is_grad_enabled(), torch.get_default_dtype()) if torch else None
    try:
        yield
    finally:
        if os.getpid() != process:  # a forked process, which would continue the run a second time
            os._exit(1)
        if directory:
            os.chdir(directory)
        if torch and settings:
            torch.set_grad_enabled(settings[0])
            torch.set_default_dtype(settings[1])


@contextlib.contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    if seconds is None:
        yield
        return

    def expire(number: int, frame: object) -> None:
        raise _Expired

    try:
        previous = signal.signal(signal.SIGALRM, expire)
    except (AttributeError, ValueError):
        raise UserError(
            "env.timeout can only be used on Unix and in the main thread: remove env.timeout"
        ) from None
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, _REPEAT_SECONDS)
        yield
    except _Expired:
        raise TimeoutError(f"took longer than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
