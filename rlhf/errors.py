"""Define the error for mistakes of the user, and functions that read the messages of errors."""

from __future__ import annotations

MAX_LINE = 500
"""Maximum number of characters that `first_line` returns, without the mark of the omission."""


class UserError(ValueError):
    """Error for a mistake of the user; the one-line message says what is wrong and what to do.

    The command line prints the message without a traceback.

    Example:
        >>> try:
        ...     rlhf.sft(model="model", data=[])
        ... except rlhf.UserError as error:
        ...     print(error)
        data: expected a path, a datasets.Dataset or a list of rows, got list without rows
    """


def message_of(error: BaseException) -> str:
    """Return an exception's message, or "" if the exception cannot be converted to text."""
    try:
        return str(error)
    except BaseException:  # the conversion can also call `sys.exit`
        return ""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or "" if the message is empty.

    A line of more than `MAX_LINE` characters, such as the text of a whole episode, is shortened at
    the end of a word if possible, so that no part of a secret remains.
    """
    line = (message_of(error).splitlines() or [""])[0]
    if len(line) <= MAX_LINE:
        return line
    start = line[:MAX_LINE]
    return f"{start.rpartition(' ')[0] or start}…"
