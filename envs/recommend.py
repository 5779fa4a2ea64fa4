"""Recommendation: infer a user's taste from clicks while recommending items."""

from __future__ import annotations

from functools import cache
from typing import Any

from rlhf.envs.core import Step, TextEnv, check_range, normalized

ITEMS = ("thriller", "romance", "documentary", "cartoon")
CLICKS = {  # probability that this kind of user watches each item
    "suspense fan": (0.9, 0.2, 0.3, 0.2),
    "family": (0.1, 0.4, 0.3, 0.9),
    "scholar": (0.3, 0.1, 0.9, 0.2),
}
"""Kind of user -> click probability per item; the agent does not know the kind."""
CHANCES = tuple(CLICKS.values())
Record = tuple[tuple[int, int], ...]
"""(times watched, times ignored) of each item."""


class Recommend(TextEnv):
    """Recommend one of four items in each of T sessions of the same unknown user.

    State: the kind of the user (one of three, equally likely). Observation: whether the last item
    was watched. Action: an item. Reward: 1.0 if the user watches it, else 0.0; an invalid action
    wastes the session. Optimum: dynamic programming over the belief about the user (a POMDP whose
    belief depends only on the counts of watched and ignored items).

    Args:
        sessions: Number of sessions, T.
    """

    items = "All episodes open alike; the user and the clicks are hidden and drawn anew."

    def __init__(self, sessions: int = 6, *, render_mode: str | None = None) -> None:
        check_range("sessions", sessions, 1, 10)
        super().__init__(render_mode=render_mode)
        self.max_turns = sessions
        self.system_prompt = (
            f"A user comes back {sessions} times. Recommend one item each time so that it gets "
            f"watched; tastes differ between users. Answer with one of: {', '.join(ITEMS)}."
        )
        self._begin(0, [0.5] * sessions)

    def _begin(self, kind: int, luck: list[float]) -> None:
        self._kind, self._luck, self._left = kind, luck, self.max_turns
        self._record = [(0, 0)] * len(ITEMS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        kind, *luck = self.np_random.random(self.max_turns + 1).tolist()
        self._begin(int(kind * len(CHANCES)), luck)
        return self.opening(f"A new user. {self._left} sessions left. Your recommendation?")

    def step(self, action: str) -> Step:
        word = normalized(action)
        self._left -= 1
        done = self._left == 0
        if word not in ITEMS:
            text = f"No such item. {self._left} sessions left."
            return self.turn(text, 0.0, done, success=None, valid=False, reason="no such item")
        item = ITEMS.index(word)
        watched = self._luck[self._left] < CHANCES[self._kind][item]
        yes, no = self._record[item]
        self._record[item] = (yes + watched, no + (not watched))
        verb = "watches" if watched else "ignores"
        text = f"The user {verb} the {word}. {self._left} sessions left."
        return self.turn(text, float(watched), done, success=None)

    def legal_actions(self) -> list[str]:
        return list(ITEMS)

    def action_values(self) -> dict[str, float]:
        record = tuple(self._record)
        return {
            word: _recommend(record, item, self._left) if self._left else 0.0
            for item, word in enumerate(ITEMS)
        }

    def optimal_value(self) -> float:
        return _value(((0, 0),) * len(ITEMS), self.max_turns)

    def random_value(self) -> float:
        chances = [chance for kind in CHANCES for chance in kind]
        return self.max_turns * sum(chances) / len(chances)

    def reference_values(self) -> dict[str, float]:
        """`oracle` knows the kind of user; `favourite` recommends the best item on average."""
        oracle = sum(max(kind) for kind in CHANCES) / len(CHANCES)
        favourite = max(sum(column) for column in zip(*CHANCES, strict=True)) / len(CHANCES)
        return {"oracle": self.max_turns * oracle, "favourite": self.max_turns * favourite}


def _likelihoods(record: Record) -> list[float]:
    """Probability of the record under each kind of user."""
    likelihoods = []
    for kind in CHANCES:
        likelihood = 1.0
        for chance, (yes, no) in zip(kind, record, strict=True):
            likelihood *= chance**yes * (1 - chance) ** no
        likelihoods.append(likelihood)
    return likelihoods


def _recommend(record: Record, item: int, left: int) -> float:
    """Value of an item with `left` sessions remaining, followed by optimal actions."""
    weights = _likelihoods(record)
    watched = sum(w * kind[item] for w, kind in zip(weights, CHANCES, strict=True)) / sum(weights)
    yes, no = record[item]
    liked = (*record[:item], (yes + 1, no), *record[item + 1 :])
    ignored = (*record[:item], (yes, no + 1), *record[item + 1 :])
    after = _value(liked, left - 1), _value(ignored, left - 1)
    return watched * (1 + after[0]) + (1 - watched) * after[1]


@cache
def _value(record: Record, left: int) -> float:
    if left == 0:
        return 0.0
    return max(_recommend(record, item, left) for item in range(len(ITEMS)))
