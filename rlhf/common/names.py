"""Validate file names that a user chooses, and suggest known names for unknown names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

FILE_NAME_RULE = "at most 100 letters, digits and _ . + = -, beginning with a letter, a digit or _"


def is_file_name(name: str) -> bool:
    """Return whether a name is safe as a file or folder name, as defined by `FILE_NAME_RULE`."""
    return re.fullmatch(r"\w[\w.+=-]{0,99}", name) is not None


def closest_name(name: str, known_names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that is most similar to ``name``.

    The result is None if no known name has a similarity of at least ``cutoff``. The similarity of
    two names is between 0 and 1.
    """
    matches = difflib.get_close_matches(name, list(known_names), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: str, known_names: Iterable[str]) -> str:
    """Return a phrase such as ``; did you mean 'learning_rate'?`` for the end of an error message.

    The phrase is empty if no known name is similar.
    """
    match = closest_name(name, known_names)
    return f"; did you mean {match!r}?" if match else ""
