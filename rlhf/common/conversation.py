"""Types of conversations and of functions that score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]
"""One turn in the Hugging Face chat format, with at least the keys ``role`` and ``content``."""
Conversation = list[Message]
Score = float | None
"""A score, or None if the conversation could not be scored."""
RewardFunction = Callable[[list[Conversation]], Sequence[Score]]
"""Function that returns a score for each conversation of a batch."""
