"""Types of conversations and of functions that score them, and comparison of their texts."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]
"""One turn in the Hugging Face chat format, with at least the keys ``role`` and ``content``."""
Conversation = list[Message]
Score = float | None
"""A score, or None if the conversation could not be scored."""
RewardFunction = Callable[[list[Conversation]], Sequence[Score]]
"""Function that returns a score for each conversation of a batch."""


def comparable_text(text: str) -> str:
    """Return a text without differences of case, white space and Unicode forms (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
