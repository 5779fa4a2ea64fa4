"""Triage: classification with tests that have a cost."""

from __future__ import annotations

from functools import cache

from rlhf.envs.core import Step, TextEnv, check_range, normalized

TESTS = {"pulse": 0.65, "temperature": 0.7, "blood": 0.75, "scan": 0.75}
"""Test -> probability that its result is correct, independently of the other tests."""
ANSWERS = ("urgent", "routine")
ACCURACIES = tuple(TESTS.values())
Results = tuple[int, ...]
"""Result of each test: 1 indicates urgent, -1 routine, 0 not taken."""


class Triage(TextEnv):
    """Decide whether a case is urgent or routine; tests have a cost and can be wrong.

    State: the true class (with probability 1/2 each) and the results so far. Observation: the
    result of a test. Action: the name of a test, or the answer `urgent` or `routine`, which ends
    the episode. Reward: `-test_cost` per test, 1.0 for the correct answer. A repeated test costs
    the same and has the same result. The maximum number of actions is the number of tests plus one;
    an invalid action uses up a turn. Optimum: dynamic programming over the 3^4 possible sets of
    results (sequential testing, Wald 1945).

    Args:
        test_cost: Cost of each test.
    """

    max_turns = len(TESTS) + 1
    items = "All episodes start with the same observation; the case and the results are drawn anew."

    def __init__(self, test_cost: float = 0.02, *, render_mode: str | None = None) -> None:
        check_range("test_cost", test_cost, 0.0, 1.0)
        super().__init__(render_mode=render_mode)
        self.test_cost = test_cost
        tests = ", ".join(f"{name} (right {chance:.0%})" for name, chance in TESTS.items())
        self.system_prompt = (
            "Decide whether a case is urgent or routine. You may take tests first; each costs "
            f"{test_cost:g} and can be wrong. The right answer pays 1. You have {self.max_turns} "
            f"turns. Answer with one word: {tests}, urgent or routine."
        )
        self._truth = 0
        # The result that each test will have if it is taken: 1 for urgent, -1 for routine.
        self._outcomes, self._seen = [1] * len(TESTS), [0] * len(TESTS)

    def start(self) -> str:
        coin, *draws = self.np_random.random(len(TESTS) + 1).tolist()
        self._truth = int(coin < 0.5)
        sign = 1 if self._truth == 0 else -1
        self._outcomes = [sign if u < p else -sign for u, p in zip(draws, ACCURACIES, strict=True)]
        self._seen = [0] * len(TESTS)
        return f"A new case has come in. {self.turns_left_text()}"

    def step(self, action: str) -> Step:
        word = normalized(action)
        self.turns_left -= 1
        if word in ANSWERS:
            success = ANSWERS.index(word) == self._truth
            return self.turn("", float(success), True, success=success)
        if word not in TESTS:
            words = ", ".join((*TESTS, *ANSWERS))
            text = f"Answer with one of: {words}. {self.turns_left_text()}"
            return self.turn(text, 0.0, valid=False, reason="neither a test nor an answer")
        test = list(TESTS).index(word)
        self._seen[test] = self._outcomes[test]
        pointed = ANSWERS[0] if self._outcomes[test] == 1 else ANSWERS[1]
        return self.turn(f"{word}: points to {pointed}. {self.turns_left_text()}", -self.test_cost)

    def legal_actions(self) -> list[str]:
        return [*TESTS, *ANSWERS]

    def action_values(self) -> dict[str, float]:
        seen, left, cost = tuple(self._seen), self.turns_left, self.test_cost
        urgent = _urgent_probability(seen)
        values = {word: _test_value(seen, test, left, cost) for test, word in enumerate(TESTS)}
        return {**values, "urgent": urgent, "routine": 1 - urgent}

    def optimal_value(self) -> float:
        return _optimal_value((0,) * len(TESTS), self.max_turns, self.test_cost)

    def random_value(self) -> float:
        answer = len(ANSWERS) / (len(ANSWERS) + len(TESTS))
        each_turn = answer / 2 - (1 - answer) * self.test_cost
        return sum((1 - answer) ** turn * each_turn for turn in range(self.max_turns))

    def reference_values(self) -> dict[str, float]:
        """Return the values of `guess` and `all_tests_free`.

        `guess` answers at once; `all_tests_free` is the optimum if tests have no cost.
        """
        return {
            "guess": 0.5,
            "all_tests_free": _optimal_value((0,) * len(TESTS), self.max_turns, 0.0),
        }


def _urgent_probability(seen: Results) -> float:
    """Return the probability that the case is urgent, given the results (Bayes' rule)."""
    urgent = routine = 0.5
    for result, right in zip(seen, ACCURACIES, strict=True):
        if result:
            urgent *= right if result == 1 else 1 - right
            routine *= 1 - right if result == 1 else right
    return urgent / (urgent + routine)


def _test_value(seen: Results, test: int, actions_left: int, cost: float) -> float:
    """Return the value of taking the test with index `test` if optimal actions follow.

    `actions_left` is the number of remaining actions, including the test.
    """
    if seen[test]:  # a repeated test gives no information
        return _optimal_value(seen, actions_left - 1, cost) - cost
    urgent, right = _urgent_probability(seen), ACCURACIES[test]
    shows_urgent = urgent * right + (1 - urgent) * (1 - right)
    value = -cost
    for result, chance in ((1, shows_urgent), (-1, 1 - shows_urgent)):
        after = (*seen[:test], result, *seen[test + 1 :])
        value += chance * _optimal_value(after, actions_left - 1, cost)
    return value


@cache
def _optimal_value(seen: Results, actions_left: int, cost: float) -> float:
    """Return the value of the optimal policy after the results `seen`."""
    if actions_left <= 0:
        return 0.0
    urgent = _urgent_probability(seen)
    tests = [
        _test_value(seen, test, actions_left, cost)
        for test, result in enumerate(seen)
        if not result
    ]
    return max(urgent, 1 - urgent, *tests)
