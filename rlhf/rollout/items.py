"""What evaluation shares with training: openings of episodes, counted as they happen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST = 20_000
"""Openings that are remembered; further ones are not, so that shares become lower bounds."""


def opening_key(messages: Sequence[Mapping[str, Any]]) -> str:
    """A short hash of what is said before the first reply of an episode."""
    digest = hashlib.sha256()
    for message in messages:
        if message["role"] == "assistant":
            break
        digest.update(f"{message['role']}\0{message['content']}\0".encode(errors="replace"))
    return digest.hexdigest()[:16]


@dataclass
class Openings:
    """The openings that training has seen."""

    seen: set[str] = field(default_factory=set)

    def note(self, conversations: Iterable[Sequence[Mapping[str, Any]]]) -> None:
        """Remember the openings of some episodes."""
        for messages in conversations:
            if len(self.seen) >= MOST:
                return
            self.seen.add(opening_key(messages))

    def shared(self, conversations: Iterable[Sequence[Mapping[str, Any]]]) -> int:
        """How many of these episodes open like one that was seen."""
        return sum(opening_key(messages) in self.seen for messages in conversations)

    def state_dict(self) -> dict[str, str]:
        """As plain data."""
        return {"seen": " ".join(sorted(self.seen))}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Restore what ``state_dict`` gave."""
        self.seen = set(state["seen"].split())


def describe_items(
    openings: Openings, rows: Sequence[Mapping[str, Any]], *, separate: bool, note: str
) -> dict[str, Any]:
    """The ``items`` of a summary: what held-out episodes share with those of training.

    Args:
        openings: of training.
        rows: of ``episodes.jsonl``.
        separate: whether the source keeps items of evaluation out of training by content.
        note: what an item of the environment is, in its own words.
    """
    return {
        "separate": separate,
        "episodes": len(rows),
        "seen_in_training": openings.shared(row["messages"] for row in rows),
        "note": note,
    }
