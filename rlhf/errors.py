"""`UserError`, which the command line prints as one line without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake; the one-line message says what is wrong and what to do."""


def message_of(error: BaseException) -> str:
    """Return an exception's message; "" if its conversion to text fails."""
    try:
        return str(error)
    except Exception:
        return ""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or "" if the message is empty."""
    return (message_of(error).splitlines() or [""])[0]
