"""Multi-armed bandit: exploration against exploitation, with the Bayes-optimal value."""

from __future__ import annotations

from functools import cache
from typing import Any

from rlhf.envs.core import Step, TextEnv, check_range, normalized

Counts = tuple[tuple[int, int], ...]
"""(successes, failures) of each arm."""


class Bandit(TextEnv):
    """Pull one of K arms, H times; each arm pays 1 with its own unknown probability.

    State: the arms' probabilities, drawn uniformly from [0, 1] at reset. Observation: the payout of
    the last pull. Action: `arm 1` ... `arm K`. Reward: 1.0 or 0.0 per pull; an invalid action
    wastes its pull. Optimum: the Bayes-adaptive value, by dynamic programming over the arms'
    success and failure counts (Gittins 1979; Duff 2002, "Optimal Learning").

    Args:
        arms: Number of arms, K.
        horizon: Number of pulls, H.
    """

    items = "All episodes open alike; the chances of the arms are hidden and drawn anew."

    def __init__(self, arms: int = 3, horizon: int = 10, *, render_mode: str | None = None) -> None:
        check_range("arms", arms, 2, 5)
        check_range("horizon", horizon, 1, 20)
        super().__init__(render_mode=render_mode)
        self.arms = arms
        self.max_turns = horizon
        self._actions = {f"arm {i + 1}": i for i in range(arms)}
        self._actions |= {f"{i + 1}": i for i in range(arms)}
        self.system_prompt = (
            f"Each of {arms} arms pays 1 with a fixed probability that you do not know. You have "
            f"{horizon} pulls; collect as much as you can. Answer with an arm, such as: arm 1"
        )
        self._begin([0.5] * arms, [0.5] * horizon)

    def _begin(self, chances: list[float], luck: list[float]) -> None:
        self._chances, self._luck, self._pulls = chances, luck, 0
        self._counts = [(0, 0)] * self.arms

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        numbers = self.np_random.random(self.arms + self.max_turns).tolist()
        self._begin(numbers[: self.arms], numbers[self.arms :])
        return self.opening(f"There are {self.arms} arms and {self.max_turns} pulls. Which arm?")

    def step(self, action: str) -> Step:
        arm = self._actions.get(normalized(action))
        luck = self._luck[self._pulls]
        self._pulls += 1
        left = self.max_turns - self._pulls
        if arm is None:
            text = f"No such arm; the pull is lost. Say arm 1 to arm {self.arms}. {left} left."
            return self.turn(text, 0.0, left == 0, success=None, valid=False, reason="no such arm")
        paid = int(luck < self._chances[arm])
        wins, losses = self._counts[arm]
        self._counts[arm] = (wins + paid, losses + 1 - paid)
        text = f"arm {arm + 1} paid {paid}. {left} left."
        return self.turn(text, float(paid), left == 0, success=None)

    def legal_actions(self) -> list[str]:
        return [f"arm {i + 1}" for i in range(self.arms)]

    def action_values(self) -> dict[str, float]:
        left = self.max_turns - self._pulls
        return {
            f"arm {arm + 1}": _pull(tuple(self._counts), arm, left) if left else 0.0
            for arm in range(self.arms)
        }

    def optimal_value(self) -> float:
        return _bayes_value(((0, 0),) * self.arms, self.max_turns)

    def random_value(self) -> float:
        return self.max_turns / 2

    def reference_values(self) -> dict[str, float]:
        """`oracle` knows the best arm: H * E[max of K uniforms]. `greedy` never explores."""
        return {
            "oracle": self.max_turns * self.arms / (self.arms + 1),
            "greedy": _greedy_value(((0, 0),) * self.arms, self.max_turns),
        }


def _outcomes(counts: Counts, arm: int) -> tuple[float, Counts, Counts]:
    """Probability that the arm pays (uniform prior), and the counts after success and failure.

    Arms are exchangeable, so the counts are sorted, which makes the cached table K! times smaller.
    """
    wins, losses = counts[arm]
    others = counts[:arm] + counts[arm + 1 :]
    won = tuple(sorted((*others, (wins + 1, losses))))
    lost = tuple(sorted((*others, (wins, losses + 1))))
    return (wins + 1) / (wins + losses + 2), won, lost


def _pull(counts: Counts, arm: int, left: int) -> float:
    """Value of pulling an arm with `left` pulls remaining and acting optimally afterwards."""
    chance, won, lost = _outcomes(counts, arm)
    after = (_bayes_value(won, left - 1), _bayes_value(lost, left - 1))
    return chance * (1 + after[0]) + (1 - chance) * after[1]


@cache
def _bayes_value(counts: Counts, left: int) -> float:
    if left == 0:
        return 0.0
    return max(_pull(counts, arm, left) for arm in range(len(counts)))


@cache
def _greedy_value(counts: Counts, left: int) -> float:
    """Value of always pulling the arm with the highest posterior mean."""
    if left == 0:
        return 0.0
    arm = max(range(len(counts)), key=lambda i: (counts[i][0] + 1) / (sum(counts[i]) + 2))
    chance, won, lost = _outcomes(counts, arm)
    after = (_greedy_value(won, left - 1), _greedy_value(lost, left - 1))
    return chance * (1 + after[0]) + (1 - chance) * after[1]
