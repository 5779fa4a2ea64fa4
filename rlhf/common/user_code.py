"""Find the line of a mistake in the user's code; report slow calls and changed arguments.

A mistake such as a wrong signature, or a result of the wrong type, is found in this toolkit, after
or before the code of the user runs. The traceback then has no line of the user, and the location is
that of the definition.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rlhf.common.foreign import (
    CodeLocation,
    ensure_ordinary_exceptions,
    exit_as_exception,
    is_library_file,
    location_text,
    set_default_location,
    user_code_location,
)
from rlhf.errors import UserError

log = logging.getLogger(__name__)

SLOW_SECONDS = 60.0
"""Duration of a call without a time limit after which a warning names the line that it executes."""

T = TypeVar("T")

_logged_warnings: set[str] = set()
"""Warnings that were given in this process."""


def definition_location(code: Any) -> CodeLocation | None:
    """Return file and line of the definition of a function, class or callable object of the user.

    The result is None for code of installed packages and of this toolkit, and for code without a
    Python source.
    """
    while isinstance(code, functools.partial):
        code = code.func
    if not isinstance(code, type) and not hasattr(code, "__code__"):
        code = type(code).__call__ if callable(code) else type(code)
    if isinstance(code, type):
        try:
            location = inspect.getsourcefile(code) or "", inspect.getsourcelines(code)[1]
        except (OSError, TypeError):  # such as a class of an interactive session
            return None
    else:
        compiled = getattr(inspect.unwrap(code) if callable(code) else None, "__code__", None)
        if not isinstance(compiled, types.CodeType):
            return None
        location = compiled.co_filename, compiled.co_firstlineno
    return None if not location[0] or is_library_file(location[0]) else location


def definition_location_text(code: Any) -> str:
    """Return the location of a definition as text for messages, such as " (mine.py:3)", or ""."""
    return location_text(definition_location(code))


@contextlib.contextmanager
def add_location_to_errors(*codes: Any, location: CodeLocation | None = None) -> Iterator[None]:
    """Return a context manager that gives a location to exceptions without a line of the user.

    Args:
        codes: The code of the user that the block calls. The location is that of the first
            definition that is known.
        location: The location, if the definition is in another process.
    """
    try:
        yield
    except Exception as error:
        location = location or next(filter(None, map(definition_location, codes)), None)
        if location is not None and user_code_location(error) is None:
            set_default_location(error, location)
        raise


@contextlib.contextmanager
def guarded_call(code: Any, *, what: str, advice: str = "") -> Iterator[None]:
    """Return a context manager for a call of the user's code in this thread.

    Exceptions have a location, an exit of the process is an exception, and a slow call is
    reported. Code without a `definition_location` is called as it is.

    Args:
        code: The function or class of the user.
        what: What the block calls, for the warning of a slow call.
        advice: What to do against a slow call; "" if the call may take any time.
    """
    location = definition_location(code)
    if location is None:
        yield
        return
    slow = f"{what}{location_text(location)}"
    with (
        add_location_to_errors(code),
        warn_if_slow(slow, advice) if advice else contextlib.nullcontext(),
        ensure_ordinary_exceptions(),
        exit_as_exception(),
    ):
        yield


def user_code_location_of_thread(identifier: int | None) -> CodeLocation | None:
    """Return file and line in the user's code that a thread executes now; None if there is none."""
    frame = sys._current_frames().get(identifier or 0)
    while frame is not None:
        if not is_library_file(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def check_accepts_arguments(
    code: Callable[..., Any],
    arguments: tuple[Any, ...] = (),
    *,
    what: str,
    required_signature: str,
    **keys: Any,
) -> None:
    """Check, before the first call, that a function of the user can be called with its arguments.

    Args:
        code: The function; a function without a readable signature is accepted.
        arguments: Placeholders of the positional arguments.
        what: What the function is, for the message.
        required_signature: How the function must be written, for the message.
        keys: Placeholders of the keyword arguments.

    Raises:
        UserError: The code is no function, its signature does not accept the arguments, or it is
            asynchronous: its call would only create a coroutine.
    """
    if not callable(code):
        raise UserError(
            f"{what} is a {type(code).__name__}: write it as a function, {required_signature}"
        )
    methods = code, getattr(code, "__call__", None)  # noqa: B004  of an object with __call__
    if any(inspect.iscoroutinefunction(m) or inspect.isasyncgenfunction(m) for m in methods):
        raise UserError(
            f"{what}{definition_location_text(code)} is defined with async def, but nothing "
            "would wait for its result: define it with def, and call asyncio.run(...) in it"
        )
    try:
        signature = inspect.signature(code)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments, **keys)
    except TypeError as error:
        raise UserError(
            f"{what}{definition_location_text(code)} has the wrong signature ({error}): "
            f"write it as {required_signature}"
        ) from None


@contextlib.contextmanager
def warn_if_slow(what: str, advice: str) -> Iterator[None]:
    """Return a context manager that warns once if the block takes longer than `SLOW_SECONDS`.

    Args:
        what: What the block calls, for the message.
        advice: What to do, for the message.
    """
    thread = threading.get_ident()
    timer = threading.Timer(
        SLOW_SECONDS, lambda: warn_of_slow_call(what, user_code_location_of_thread(thread), advice)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def warn_of_slow_call(what: str, location: CodeLocation | None, advice: str) -> None:
    """Log, once, that a call of the user's code has been running for `SLOW_SECONDS`."""
    warn_once(f"{what} has been running for {SLOW_SECONDS:g} s{location_text(location)}: {advice}")


def warn_once(message: str) -> None:
    """Log a warning, unless this process has given it before."""
    if message not in _logged_warnings:
        _logged_warnings.add(message)
        log.warning("%s", message)


def copy_of_argument(value: T) -> T:
    """Return a deep copy of an argument for the user's code; the value itself if it has no copy."""
    try:
        return copy.deepcopy(value)
    except Exception:  # such as a lock or an open file
        return value


def warn_if_argument_changed(
    before: Any, after: Any, *, what: str, code: Any, argument: str
) -> None:
    """Warn, once, if code of the user has changed the copy of an argument that it was given.

    Args:
        before: The argument.
        after: The copy, after the call.
        what: What was called, for the message.
        code: The called function or class, whose definition is the location.
        argument: Name of the argument, for the message.
    """
    try:
        changed = bool(before != after)
    except Exception:  # values that cannot be compared, such as arrays
        return
    if changed:
        warn_once(
            f"{what}{definition_location_text(code)} changes its argument {argument}, which has "
            "no effect outside: it receives a copy; build a new value instead"
        )
