"""T-maze: remember a sign from the start of the episode. Without memory, success is by chance."""

from __future__ import annotations

import numpy as np

from rlhf.envs.core import Step, TextEnv, check_range, normalized

ACTIONS: tuple[str, ...] = ("forward", "left", "right")


class TMaze(TextEnv):
    """Walk down a corridor to a junction and turn in the direction of a sign at the start.

    State: the sign (left or right), the position in the corridor (0 to L) and the remaining steps.
    Observation: the sign in the first observation only, then "corridor" or "junction". The number
    of remaining steps is not shown, because a policy without memory could encode the sign in it.
    Action: forward, left or right. Left or right inside the corridor, forward at the junction, and
    an invalid action waste a step. Reward: 1.0 for turning in the direction of the sign at the
    junction, else 0.0. The episode ends with a turn at the junction or after T steps. Optimum: 1.0
    with memory, 0.5 for the best policy that sees only the current observation (Bakker 2002,
    "Reinforcement Learning with Long Short-Term Memory").

    Args:
        length: Number of steps from the start to the junction, L.
        steps: Maximum number of actions in an episode, T.
    """

    items = "Two episodes, one for each sign, both of which also occur in training."

    def __init__(self, length: int = 4, steps: int = 8, *, render_mode: str | None = None) -> None:
        check_range("length", length, 1, 100)
        check_range("steps", steps, length + 1, 1000)
        super().__init__(max_turns=steps, render_mode=render_mode)
        self.length = length
        self.system_prompt = (
            "You walk through a maze. Answer with one word: forward, left or right. A sign at the "
            f"start tells you where to turn at the junction. You have {steps} steps in all; the "
            "right turn pays 1."
        )
        self._sign, self._position = "left", 0

    def start(self) -> str:
        self._sign, self._position = ("left", "right")[int(self.np_random.integers(2))], 0
        return f"The sign says {self._sign}. You are in a corridor."

    def step(self, action: str) -> Step:
        word = normalized(action)
        self.turns_left -= 1
        valid = word in ACTIONS
        if valid and self._position == self.length and word in ("left", "right"):
            success = word == self._sign
            return self.turn("", float(success), True, success=success)
        self._position = _next_position(self._position, word, self.length)
        place = "at a junction" if self._position == self.length else "in a corridor"
        reason = "" if valid else f"not one of {', '.join(ACTIONS)}"
        return self.turn(f"You are {place}.", 0.0, valid=valid, reason=reason)

    def legal_actions(self) -> list[str]:
        return list(ACTIONS)

    def action_values(self) -> dict[str, float]:
        if self._position == self.length:
            values = {word: float(word == self._sign) for word in ("left", "right")}
            return {**values, "forward": float(self.turns_left >= 2)}
        after = {word: _next_position(self._position, word, self.length) for word in ACTIONS}
        return {w: float(self.turns_left - 1 >= self.length - p + 1) for w, p in after.items()}

    def optimal_value(self) -> float:
        return float(self.max_turns >= self.length + 1)

    def random_value(self) -> float:
        """Compute the exact value by propagating the distribution over positions."""
        probabilities, value = np.eye(self.length + 1)[0], 0.0
        for _ in range(self.max_turns):
            forward, turns = probabilities / 3, probabilities * 2 / 3
            value += turns[-1] / 2  # half of the turns at the junction are correct
            probabilities = np.append(turns[:-1], forward[-1])
            probabilities[1:] += forward[:-1]
        return float(value)

    def reference_values(self) -> dict[str, float]:
        """Return the value of `memoryless`, the best policy that sees only the current observation.

        The turn of this policy at the junction does not depend on the sign, so it is correct in
        half of the episodes.
        """
        return {"memoryless": self.optimal_value() / 2}


def _next_position(position: int, word: str, length: int) -> int:
    """Return the position after an action; only forward changes it."""
    return min(position + (word == "forward"), length)
