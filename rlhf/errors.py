"""Define the error for mistakes of the user, and functions that read the messages of errors."""

from __future__ import annotations


class UserError(ValueError):
    """Error for a mistake of the user; the one-line message says what is wrong and what to do.

    The command line prints the message without a traceback.
    """


def message_of(error: BaseException) -> str:
    """Return an exception's message, or "" if the exception cannot be converted to text."""
    try:
        return str(error)
    except BaseException:  # the conversion can also call `sys.exit`
        return ""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or "" if the message is empty."""
    return (message_of(error).splitlines() or [""])[0]
