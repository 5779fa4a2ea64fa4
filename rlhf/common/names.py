"""The nearest known name to one that does not exist, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that is most similar to ``name``, None if none is similar enough.

    The similarity, from 0 to 1, must be at least ``cutoff``.
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a phrase such as ``; did you mean 'learning_rate'?`` for the end of an error message.

    The phrase is empty where no known name is similar.
    """
    match = closest(name, known)
    return f"; did you mean {match!r}?" if match else ""
