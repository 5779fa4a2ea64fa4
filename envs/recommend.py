"""Recommendation: learn a user's taste from the user's clicks while recommending items."""

from __future__ import annotations

from rlhf.envs.bandit import BernoulliBandit, Counts
from rlhf.envs.core import check_range

ITEMS = ("thriller", "romance", "documentary", "cartoon")
WATCH_PROBABILITIES_BY_USER = {
    "suspense fan": (0.9, 0.2, 0.3, 0.2),
    "family": (0.1, 0.4, 0.3, 0.9),
    "scholar": (0.3, 0.1, 0.9, 0.2),
}
"""Kind of user, which the agent does not know -> probability that the user watches each item."""
WATCH_PROBABILITIES = tuple(WATCH_PROBABILITIES_BY_USER.values())


class Recommend(BernoulliBandit):
    """Recommend one of four items in each of T sessions of the same user of unknown kind.

    State: the kind of the user (one of three, equally likely). Observation: whether the last item
    was watched. Action: an item. Reward: 1.0 if the user watches it, else 0.0; an invalid action
    wastes the session. Optimum: dynamic programming over the belief about the user (a POMDP whose
    belief depends only on the counts of watched and ignored items).

    Args:
        sessions: Number of sessions, T.
    """

    items = "All episodes start with the same observation; the user and the clicks are drawn anew."
    invalid_reason = "no such item"

    def __init__(self, sessions: int = 6, *, render_mode: str | None = None) -> None:
        check_range("sessions", sessions, 1, 10)
        super().__init__(
            ITEMS, _watch_chance_and_next_counts, max_turns=sessions, render_mode=render_mode
        )
        self.system_prompt = (
            f"A user comes back {sessions} times. Recommend one item each time so that it gets "
            f"watched; tastes differ between users. Answer with one of: {', '.join(ITEMS)}."
        )

    def start(self) -> str:
        kind, *uniforms = self.np_random.random(self.max_turns + 1).tolist()
        self._begin_episode(WATCH_PROBABILITIES[int(kind * len(WATCH_PROBABILITIES))], uniforms)
        return f"A new user. {self.turns_left} sessions left. Your recommendation?"

    def _invalid_text(self) -> str:
        return f"No such item. {self.turns_left} sessions left."

    def _outcome_text(self, arm: int, paid: int) -> str:
        verb = "watches" if paid else "ignores"
        return f"The user {verb} the {ITEMS[arm]}. {self.turns_left} sessions left."

    def random_value(self) -> float:
        chances = [chance for kind in WATCH_PROBABILITIES for chance in kind]
        return self.max_turns * sum(chances) / len(chances)

    def reference_values(self) -> dict[str, float]:
        """Return the values of two policies without exploration.

        `oracle` recommends the best item for the kind of user, `favorite` the item that is best on
        average over the kinds.
        """
        oracle = sum(max(kind) for kind in WATCH_PROBABILITIES) / len(WATCH_PROBABILITIES)
        favorite = max(sum(column) for column in zip(*WATCH_PROBABILITIES, strict=True)) / len(
            WATCH_PROBABILITIES
        )
        return {"oracle": self.max_turns * oracle, "favorite": self.max_turns * favorite}


def _watch_chance_and_next_counts(counts: Counts, item: int) -> tuple[float, Counts, Counts]:
    """Return the probability that an item is watched, and the counts after each outcome.

    The counts are one pair (watched, ignored) for each item; see `Posterior`.
    """
    weights = []  # likelihood of the counts for each kind of user
    for kind in WATCH_PROBABILITIES:
        likelihood = 1.0
        for chance, (yes, no) in zip(kind, counts, strict=True):
            likelihood *= chance**yes * (1 - chance) ** no
        weights.append(likelihood)
    watched = sum(
        w * kind[item] for w, kind in zip(weights, WATCH_PROBABILITIES, strict=True)
    ) / sum(weights)
    yes, no = counts[item]
    before, after = counts[:item], counts[item + 1 :]
    return watched, (*before, (yes + 1, no), *after), (*before, (yes, no + 1), *after)
