"""The exception that the command line shows as a single line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user: one line that says what is wrong and what to do."""
