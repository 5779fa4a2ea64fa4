"""Limit the effects of user code or third-party code, such as environments, rewards and judges."""

from __future__ import annotations

import contextlib
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
    reserved for results.

    Args:
        timeout: Time limit in seconds; None means no limit. Native code that does not handle
            signals is interrupted only when it returns to Python.

    Raises:
        RuntimeError: The code called ``sys.exit``, or raised another BaseException that is not an
            Exception.
        TimeoutError: The code exceeded the time limit.
        UserError: A time limit is set, but signals are not available, because the system is not
            Unix or because the code does not run in the main thread.
    """
    with contextlib.redirect_stdout(sys.stderr), _time_limit(timeout):
        try:
            yield
        except (Exception, KeyboardInterrupt, GeneratorExit, _Expired):
            raise
        except SystemExit as error:
            raise RuntimeError(f"called sys.exit({error.code!r})") from error
        except BaseException as error:
            raise RuntimeError(f"raised {type(error).__name__}: {message_of(error)}") from error


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
