"""Call user code or third-party code: environments, rewards, judges, rollout engines."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

from rlhf.errors import UserError, message_of

_REPEAT_SECONDS = 1.0
"""Interval of further interruptions in seconds, for code that catches the first interruption."""


class _Expired(BaseException):
    """Raised in a call that exceeds its time limit.

    It is not an Exception, because the called code may catch every Exception.
    """


@contextlib.contextmanager
def limit_side_effects(timeout: float | None = None) -> Iterator[None]:
    """Return a context manager that limits the side effects of third-party code on this process.

    Output of the code goes to standard error, because standard output is for results.

    Args:
        timeout: Limit in seconds; None means no limit. Native code that does not handle signals is
        interrupted only when it returns to Python.

    Raises:
        RuntimeError: The code called ``sys.exit`` or raised another BaseException.
        TimeoutError: The code exceeded the limit.
        UserError: There is a limit, and this is not the main thread of a Unix process.
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
            "a timeout of an environment can only be used in the main thread and on Unix"
        ) from None
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, _REPEAT_SECONDS)
        yield
    except _Expired:
        raise TimeoutError(f"took longer than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
