"""T-maze: remember a sign seen at the start. Without memory one does no better than a coin."""

from __future__ import annotations

import itertools
from typing import Any

from rlhf.envs.core import Step, TextEnv, check_range, plain

ACTIONS: tuple[str, ...] = ("forward", "left", "right")


class TMaze(TextEnv):
    """Walk down a corridor to a junction and turn where a sign at the start said.

    State: the sign (left or right), the place in the corridor 0 ... L, the steps left. Observation:
    the sign in the first observation only; afterwards "corridor" or "junction", without the turns
    left: a policy without memory could read the sign from them. Action: forward, left or right; a
    turn inside the corridor bumps into a wall. An invalid action loses a step. Reward: 1.0
    for the right turn at the junction, else 0.0; any turn there ends the episode, as do T steps.
    Optimum 1.0 with memory, 0.5 for the best policy that sees only the present observation (Bakker
    2002, "Reinforcement Learning with Long Short-Term Memory").

    Args:
        length: L, corridor steps before the junction.
        steps: T, actions allowed.
    """

    items = "Two episodes, one for each sign, both in training too."

    def __init__(self, length: int = 4, steps: int = 8, *, render_mode: str | None = None) -> None:
        check_range("length", length, 1, 100)
        check_range("steps", steps, length + 1, 1000)
        super().__init__(render_mode=render_mode)
        self.length, self.max_turns = length, steps
        self.system_prompt = (
            "You walk through a maze. Answer with one word: forward, left or right. A sign at the "
            f"start tells you where to turn at the junction. You have {steps} steps in all; the "
            "right turn pays 1."
        )
        self._begin("left")

    def _begin(self, sign: str) -> None:
        self._sign, self._place, self._left = sign, 0, self.max_turns

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._begin(("left", "right")[int(self.np_random.integers(2))])
        return self.opening(f"The sign says {self._sign}. You are in a corridor.")

    def step(self, action: str) -> Step:
        word = plain(action)
        self._left -= 1
        valid = word in ACTIONS
        if valid and self._place == self.length and word in ("left", "right"):
            success = word == self._sign
            return self.turn("", float(success), True, success=success)
        self._place = _walk(self._place, word, self.length)
        text = "You are at a junction." if self._place == self.length else "You are in a corridor."
        reason = "" if valid else f"not one of {', '.join(ACTIONS)}"
        return self.turn(text, 0.0, self._left == 0, valid=valid, reason=reason)

    def legal_actions(self) -> list[str]:
        return list(ACTIONS)

    def action_values(self) -> dict[str, float]:
        if self._place == self.length:
            values = {word: float(word == self._sign) for word in ("left", "right")}
            return {**values, "forward": float(self._left >= 2)}
        after = {word: _walk(self._place, word, self.length) for word in ACTIONS}
        return {w: float(self._left - 1 >= self.length - p + 1) for w, p in after.items()}

    def optimal_value(self) -> float:
        return float(self.max_turns >= self.length + 1)

    def random_value(self) -> float:
        uniform = dict.fromkeys(ACTIONS, 1 / len(ACTIONS))
        return self._memoryless_value({"start": uniform, "corridor": uniform, "junction": uniform})

    def reference_values(self) -> dict[str, float]:
        """`memoryless`: the best deterministic policy that sees only the present observation.

        The sign is part of the first observation, but nothing of it is left at the junction, so one
        choice for the start stands for both signs.
        """
        places = ("start", "corridor", "junction")
        policies = itertools.product(ACTIONS, repeat=len(places))
        certain = (
            {place: {word: 1.0} for place, word in zip(places, policy, strict=True)}
            for policy in policies
        )
        return {"memoryless": max(map(self._memoryless_value, certain))}

    def _memoryless_value(self, policy: dict[str, dict[str, float]]) -> float:
        """Exact value of a policy by observation, by following the distribution over places."""
        shares, value = {0: 1.0}, 0.0
        for step in range(self.max_turns):
            following: dict[int, float] = {}
            for place, share in shares.items():
                seen = "junction" if place == self.length else "corridor" if step else "start"
                for word, chance in policy[seen].items():
                    if place == self.length and word in ("left", "right"):
                        # The sign is fair and independent of all that the policy sees here.
                        value += share * chance / 2
                    else:
                        target = _walk(place, word, self.length)
                        following[target] = following.get(target, 0.0) + share * chance
            shares = following
        return value


def _walk(place: int, word: str, length: int) -> int:
    """The place after a step; anything but forward stays."""
    return min(place + (word == "forward"), length)
