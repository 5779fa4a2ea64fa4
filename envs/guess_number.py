"""Guess a number from higher-or-lower answers; by default, the guesses may not be enough."""

from __future__ import annotations

from functools import cache

from rlhf.envs.core import Step, TextEnv, check_range, normalized


class GuessNumber(TextEnv):
    """Find a number between 1 and N in T guesses; each response is higher or lower.

    State: the hidden number, uniform on 1 ... N. Observation: "higher" or "lower" with the
    number of guesses left, or "correct". Action: a number. Reward: 1.0 for the correct guess, which
    ends the episode, else 0.0. An invalid guess uses up a turn. Optimum: dynamic programming over
    the size of the interval of possible numbers (bisection always finds the number if N is at most
    2^T - 1).

    Args:
        numbers: Largest number, N.
        guesses: Number of guesses, T.
    """

    items = (
        "All episodes start with the same observation; the hidden numbers also occur in training."
    )

    def __init__(
        self, numbers: int = 20, guesses: int = 4, *, render_mode: str | None = None
    ) -> None:
        check_range("numbers", numbers, 2, 1000)
        check_range("guesses", guesses, 1, 20)
        super().__init__(max_turns=guesses, render_mode=render_mode)
        self.numbers = numbers
        self._actions = {str(n): n for n in range(1, numbers + 1)}
        self.system_prompt = (
            f"Find a hidden number from 1 to {numbers} with at most {guesses} guesses. After each "
            "guess you are told whether the number is higher or lower. Answer with a number only."
        )
        self._hidden, self._low, self._high = 1, 1, numbers

    def start(self) -> str:
        self._hidden = int(self.np_random.integers(1, self.numbers + 1))
        self._low, self._high = 1, self.numbers
        return f"Guess a number from 1 to {self.numbers}. {self.turns_left} guesses left."

    def step(self, action: str) -> Step:
        guess = self._actions.get(normalized(action))
        self.turns_left -= 1
        if guess == self._hidden:
            return self.turn("correct", 1.0, True, success=True)
        left = f"{self.turns_left} guesses left."
        if guess is None:
            text = f"Answer with a number from 1 to {self.numbers}. {left}"
            return self.turn(text, 0.0, valid=False, reason="not a number in range")
        if guess < self._hidden:
            self._low = max(self._low, guess + 1)
            return self.turn(f"higher. {left}", 0.0)
        self._high = min(self._high, guess - 1)
        return self.turn(f"lower. {left}", 0.0)

    def legal_actions(self) -> list[str]:
        return list(self._actions)

    def action_values(self) -> dict[str, float]:
        size, left = self._high - self._low + 1, self.turns_left - 1
        wasted = _numbers_found_by_best_strategy(size, max(left, 0)) / size
        values = dict.fromkeys(self._actions, wasted)
        for guess in range(self._low, self._high + 1):
            below, above = guess - self._low, self._high - guess
            values[str(guess)] = (
                1
                + _numbers_found_by_best_strategy(below, left)
                + _numbers_found_by_best_strategy(above, left)
            ) / size
        return values

    def best_action(self) -> str:
        """Return the optimal guess that is nearest to the middle of the interval of possible
        numbers."""
        values, middle = self.action_values(), (self._low + self._high) / 2
        return max(values, key=lambda guess: (values[guess], -abs(int(guess) - middle)))

    def optimal_value(self) -> float:
        return _numbers_found_by_best_strategy(self.numbers, self.max_turns) / self.numbers

    def random_value(self) -> float:
        return 1.0 - (1.0 - 1.0 / self.numbers) ** self.max_turns

    def reference_values(self) -> dict[str, float]:
        """Return the value of `consistent`, which guesses uniformly among the possible numbers."""
        return {
            "consistent": _numbers_found_by_consistent_guesses(self.numbers, self.max_turns)
            / self.numbers
        }


@cache
def _numbers_found_by_best_strategy(size: int, guesses_left: int) -> int:
    """Return how many of `size` possible numbers the best strategy finds.

    Divided by `size`, the result is the probability of success if the hidden number is uniform.
    """
    if size == 0 or guesses_left <= 0:
        return 0
    return max(
        1
        + _numbers_found_by_best_strategy(k, guesses_left - 1)
        + _numbers_found_by_best_strategy(size - 1 - k, guesses_left - 1)
        for k in range(size)
    )


@cache
def _numbers_found_by_consistent_guesses(size: int, guesses_left: int) -> float:
    """Return the expected number of `size` possible numbers that random consistent guesses find.

    Each guess is drawn uniformly from the numbers that are still possible.
    """
    if size == 0 or guesses_left == 0:
        return 0.0
    halves = sum(
        _numbers_found_by_consistent_guesses(k, guesses_left - 1)
        + _numbers_found_by_consistent_guesses(size - 1 - k, guesses_left - 1)
        for k in range(size)
    )
    return 1 + halves / size
