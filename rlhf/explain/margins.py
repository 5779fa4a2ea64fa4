"""Margins of pairs of conversations."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.common.conversation import Conversation, Score
from rlhf.reward_models.core import Reward


def margins(reward: Reward, pairs: Sequence[tuple[Conversation, Conversation]]) -> list[Score]:
    """Return score(first) - score(second) of N pairs, [N]; None if a score is missing."""
    values = reward.score([text for pair in pairs for text in pair]).values
    return [
        None if a is None or b is None else a - b
        for a, b in zip(values[::2], values[1::2], strict=True)
    ]
