"""T-maze: remember a sign from the start. A policy without memory is no better than chance."""

from __future__ import annotations

import itertools

from rlhf.envs.core import Step, TextEnv, check_range, normalized

ACTIONS: tuple[str, ...] = ("forward", "left", "right")


class TMaze(TextEnv):
    """Walk down a corridor to a junction and turn in the direction of a sign at the start.

    State: the sign (left or right), the position in the corridor 0 ... L and the remaining steps.
    Observation: the sign in the first observation only, then "corridor" or "junction". The number
    of remaining turns is not shown, because a policy without memory could encode the sign in it.
    Action: forward, left or right; a turn inside the corridor, or an invalid action, wastes a step.
    Reward: 1.0 for the right turn at the junction, else 0.0; any turn there ends the episode, as do
    T steps. Optimum: 1.0 with memory, 0.5 for the best policy that sees only the current
    observation (Bakker 2002, "Reinforcement Learning with Long Short-Term Memory").

    Args:
        length: Corridor steps before the junction, L.
        steps: Longest episode in actions, T.
    """

    items = "Two episodes, one for each sign, both in training too."

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
        uniform = dict.fromkeys(ACTIONS, 1 / len(ACTIONS))
        return self._memoryless_value({"start": uniform, "corridor": uniform, "junction": uniform})

    def reference_values(self) -> dict[str, float]:
        """`memoryless`: the best deterministic policy that sees only the current observation.

        At the junction such a policy has no information about the sign, so it need not distinguish
        the two first observations.
        """
        observations = ("start", "corridor", "junction")
        policies = (
            {seen: {word: 1.0} for seen, word in zip(observations, words, strict=True)}
            for words in itertools.product(ACTIONS, repeat=len(observations))
        )
        return {"memoryless": max(map(self._memoryless_value, policies))}

    def _memoryless_value(self, policy: dict[str, dict[str, float]]) -> float:
        """Exact value of a policy, by propagating the distribution over positions.

        `policy` maps an observation to the probability of each action.
        """
        probabilities, value = {0: 1.0}, 0.0
        for step in range(self.max_turns):
            after: dict[int, float] = {}
            for position, reached in probabilities.items():
                seen = "junction" if position == self.length else "corridor" if step else "start"
                for word, chance in policy[seen].items():
                    if position == self.length and word in ("left", "right"):
                        # The sign is fair and independent of the observation at the junction.
                        value += reached * chance / 2
                    else:
                        target = _next_position(position, word, self.length)
                        after[target] = after.get(target, 0.0) + reached * chance
            probabilities = after
        return value


def _next_position(position: int, word: str, length: int) -> int:
    """The position after an action; only forward changes it."""
    return min(position + (word == "forward"), length)
