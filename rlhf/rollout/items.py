"""Count evaluation episodes that start with the same messages as training episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.common.conversation import comparable_text
from rlhf.rollout.batch import Rollout

MAX_OPENINGS = 20_000
"""Maximum number of stored openings. Openings beyond this number are not stored, so the counts of
shared openings are lower bounds in this case."""


def opening_messages_hash(messages: Sequence[Mapping[str, Any]], num_replies: int) -> str:
    """Return a short hash of the messages before the policy's first reply.

    The hash ignores the same differences as the split of prompts; see `comparable_text`.

    Args:
        messages: The conversation of an episode.
        num_replies: Number of the policy's replies. They are the last assistant messages.
    """
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    digest = hashlib.sha256()
    for message in messages[: assistant[-num_replies] if num_replies else None]:
        content = comparable_text(message["content"])
        digest.update(f"{message['role']}\0{content}\0".encode(errors="replace"))
    return digest.hexdigest()[:16]


@dataclass
class SeenOpenings:
    """Set of the openings (messages before the first reply) of training episodes."""

    seen: set[str] = field(default_factory=set)

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Add the openings of these episodes, until `MAX_OPENINGS` are stored."""
        for rollout in rollouts:
            if len(self.seen) >= MAX_OPENINGS:
                return
            self.seen.add(opening_messages_hash(rollout.conversation, rollout.num_turns))

    def count_rows_with_seen_opening(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Return the number of rows of ``episodes.jsonl`` whose opening is in the set."""
        return sum(
            opening_messages_hash(row["messages"], row["turns"]) in self.seen for row in rows
        )

    def state_dict(self) -> dict[str, str]:
        """Return the state as plain Python data."""
        return {"seen": " ".join(sorted(self.seen))}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Restore a state that ``state_dict`` returned."""
        self.seen = set(state["seen"].split())


def summarize_item_overlap(
    openings: SeenOpenings,
    rows: Sequence[Mapping[str, Any]],
    *,
    has_separate_items: bool,
    note: str,
) -> dict[str, Any]:
    """Return the entry ``items`` of an evaluation summary, the overlap with training episodes.

    Args:
        openings: Openings of the training episodes.
        rows: Rows of ``episodes.jsonl``.
        has_separate_items: Whether the environment has separate items for training and evaluation.
        note: The environment's description of its items.
    """
    return {
        "separate": has_separate_items,
        "episodes": len(rows),
        "seen_in_training": openings.count_rows_with_seen_opening(rows),
        "note": note,
    }
