"""The exception that the command line reports in one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user: one line that says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message; "" if it has none."""
    return (str(error).splitlines() or [""])[0]
