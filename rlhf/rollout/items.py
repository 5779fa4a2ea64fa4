"""Count evaluation episodes that start with the same messages as training episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_OPENINGS = 20_000
"""Maximum number of stored openings.

If it is exceeded, counts of shared openings are lower bounds.
"""


def opening_key(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a short hash of the messages before the first reply of an episode."""
    digest = hashlib.sha256()
    for message in messages:
        if message["role"] == "assistant":
            break
        digest.update(f"{message['role']}\0{message['content']}\0".encode(errors="replace"))
    return digest.hexdigest()[:16]


@dataclass
class Openings:
    """Set of the openings (messages before the first reply) of training episodes."""

    seen: set[str] = field(default_factory=set)

    def note(self, conversations: Iterable[Sequence[Mapping[str, Any]]]) -> None:
        """Add the openings of these episodes."""
        for messages in conversations:
            if len(self.seen) >= MAX_OPENINGS:
                return
            self.seen.add(opening_key(messages))

    def shared(self, conversations: Iterable[Sequence[Mapping[str, Any]]]) -> int:
        """Return the number of these episodes whose opening is in the set."""
        return sum(opening_key(messages) in self.seen for messages in conversations)

    def state_dict(self) -> dict[str, str]:
        """Return the state as plain Python data."""
        return {"seen": " ".join(sorted(self.seen))}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Restore a state from ``state_dict``."""
        self.seen = set(state["seen"].split())


def describe_items(
    openings: Openings, rows: Sequence[Mapping[str, Any]], *, separate: bool, note: str
) -> dict[str, Any]:
    """Return the entry ``items`` of an evaluation summary: its overlap with training.

    Args:
        openings: openings of the training episodes.
        rows: rows of ``episodes.jsonl``.
        separate: whether the environment separates evaluation items from training items.
        note: the environment's description of an item.
    """
    return {
        "separate": separate,
        "episodes": len(rows),
        "seen_in_training": openings.shared(row["messages"] for row in rows),
        "note": note,
    }
