"""Multi-armed bandits (exploration versus exploitation), with the Bayes-optimal value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from rlhf.envs.core import Step, TextEnv, check_range, normalized

Counts = tuple[tuple[int, int], ...]
"""One pair (successes, failures) for each arm."""
Posterior = Callable[[Counts, int], tuple[float, Counts, Counts]]
"""Function (counts, arm) -> (probability of success, counts after success, after failure)."""


class BernoulliBandit(TextEnv):
    """Choose one of K arms in each turn; an arm pays 1 with a hidden probability, else 0.

    The belief about the arms depends only on the numbers of successes and failures of each arm, so
    the optimum is computed by dynamic programming over these counts. Subclasses define the texts
    and `start`, which draws the content of an episode.

    Args:
        actions: The action of each arm.
        posterior: Function of the counts and of an arm. It returns the probability that the arm
            pays, the counts after a success and the counts after a failure.
        max_turns: Number of pulls.
    """

    invalid_reason = "no such arm"

    def __init__(
        self,
        actions: Sequence[str],
        posterior: Posterior,
        *,
        max_turns: int,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(max_turns=max_turns, render_mode=render_mode)
        self._actions, self._posterior = tuple(actions), posterior
        self._arms = {action: arm for arm, action in enumerate(actions)}
        self._begin_episode([0.5] * len(self._actions), [0.5] * max_turns)

    def _begin_episode(self, chances: Sequence[float], uniforms: Sequence[float]) -> None:
        """Start an episode with empty counts.

        Args:
            chances: Success probability of each arm.
            uniforms: One uniform random number for each turn, which determines whether the arm
                pays. The numbers are used from the last one to the first.
        """
        self._chances, self._uniforms = chances, uniforms
        self._counts = [(0, 0)] * len(self._actions)

    def step(self, action: str) -> Step:
        arm = self._arms.get(normalized(action))
        self.turns_left -= 1
        if arm is None:
            reason = self.invalid_reason
            return self.turn(self._invalid_text(), 0.0, success=None, valid=False, reason=reason)
        paid = int(self._uniforms[self.turns_left] < self._chances[arm])
        wins, losses = self._counts[arm]
        self._counts[arm] = (wins + paid, losses + 1 - paid)
        return self.turn(self._outcome_text(arm, paid), float(paid), success=None)

    def _invalid_text(self) -> str:
        """Return the observation after an invalid action."""
        raise NotImplementedError

    def _outcome_text(self, arm: int, paid: int) -> str:
        """Return the observation after pulling `arm`; `paid` is 1 or 0."""
        raise NotImplementedError

    def legal_actions(self) -> list[str]:
        return list(self._actions)

    def action_values(self) -> dict[str, float]:
        counts, left = tuple(self._counts), self.turns_left
        return {
            action: _arm_value(self._posterior, counts, arm, left) if left else 0.0
            for arm, action in enumerate(self._actions)
        }

    def optimal_value(self) -> float:
        return _optimal_or_greedy_value(
            self._posterior, ((0, 0),) * len(self._actions), self.max_turns
        )


def _arm_value(
    posterior: Posterior, counts: Counts, arm: int, turns_left: int, greedy: bool = False
) -> float:
    """Return the value of pulling an arm with `turns_left` remaining turns, including this pull.

    The later pulls are optimal. If `greedy` is set, they follow the greedy policy of
    `_optimal_or_greedy_value`.
    """
    chance, *after = posterior(counts, arm)
    won, lost = (
        _optimal_or_greedy_value(posterior, new_counts, turns_left - 1, greedy)
        for new_counts in after
    )
    return chance * (1 + won) + (1 - chance) * lost


@cache
def _optimal_or_greedy_value(
    posterior: Posterior, counts: Counts, turns_left: int, greedy: bool = False
) -> float:
    """Return the value of the optimal policy with `turns_left` remaining turns.

    If `greedy` is set, return the value of the policy that always chooses the arm with the highest
    posterior mean.
    """
    if turns_left == 0:
        return 0.0
    arms: Sequence[int] = range(len(counts))
    if greedy:
        arms = [max(arms, key=lambda arm: posterior(counts, arm)[0])]
    return max(_arm_value(posterior, counts, arm, turns_left, greedy) for arm in arms)


class Bandit(BernoulliBandit):
    """Pull one of K arms, H times; arms pay 1 with different unknown probabilities, else 0.

    State: the arms' probabilities, drawn uniformly from [0, 1] at reset. Observation: the payout of
    the last pull. Action: `arm 1` ... `arm K`. Reward: 1.0 or 0.0 per pull; an invalid action
    wastes its pull. Optimum: the Bayes-adaptive value, by dynamic programming over the arms'
    success and failure counts (Gittins 1979; Duff 2002, "Optimal Learning").

    Args:
        arms: Number of arms, K.
        horizon: Number of pulls, H.
    """

    items = "All episodes start with the same observation; the arms' chances are drawn anew."

    def __init__(self, arms: int = 3, horizon: int = 10, *, render_mode: str | None = None) -> None:
        check_range("arms", arms, 2, 5)
        check_range("horizon", horizon, 1, 20)
        actions = [f"arm {i + 1}" for i in range(arms)]
        super().__init__(
            actions, _success_chance_and_next_counts, max_turns=horizon, render_mode=render_mode
        )
        self.arms = arms
        self._arms |= {f"{i + 1}": i for i in range(arms)}
        self.system_prompt = (
            f"Each of {arms} arms pays 1 with a fixed probability that you do not know. You have "
            f"{horizon} pulls; collect as much as you can. Answer with an arm, such as: arm 1"
        )

    def start(self) -> str:
        numbers = self.np_random.random(self.arms + self.max_turns).tolist()
        self._begin_episode(numbers[: self.arms], numbers[: self.arms - 1 : -1])
        return f"There are {self.arms} arms and {self.max_turns} pulls. Which arm?"

    def _invalid_text(self) -> str:
        arms, left = self.arms, self.turns_left
        return f"No such arm; the pull is lost. Say arm 1 to arm {arms}. {left} left."

    def _outcome_text(self, arm: int, paid: int) -> str:
        return f"arm {arm + 1} paid {paid}. {self.turns_left} left."

    def random_value(self) -> float:
        return self.max_turns / 2

    def reference_values(self) -> dict[str, float]:
        """Return the values of `oracle` and `greedy`.

        `oracle` always pulls the best arm; its value is H times the expected maximum of K uniform
        numbers, K / (K + 1). `greedy` always pulls the arm with the highest posterior mean, without
        exploration.
        """
        return {
            "oracle": self.max_turns * self.arms / (self.arms + 1),
            "greedy": _optimal_or_greedy_value(
                _success_chance_and_next_counts, ((0, 0),) * self.arms, self.max_turns, greedy=True
            ),
        }


def _success_chance_and_next_counts(counts: Counts, arm: int) -> tuple[float, Counts, Counts]:
    """Compute the posterior of an arm with a uniform prior; see `Posterior`.

    The arms are exchangeable, so the returned counts are sorted. This reduces the number of cached
    values by a factor of up to K!.
    """
    wins, losses = counts[arm]
    others = counts[:arm] + counts[arm + 1 :]
    won = tuple(sorted((*others, (wins + 1, losses))))
    lost = tuple(sorted((*others, (wins, losses + 1))))
    return (wins + 1) / (wins + losses + 2), won, lost
