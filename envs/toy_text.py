"""Gymnasium's toy_text tasks as text environments, with exact values from transition tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium.envs.toy_text.cliffwalking import CliffWalkingEnv
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from gymnasium.envs.toy_text.taxi import TaxiEnv
from gymnasium.envs.toy_text.utils import categorical_sample

from rlhf.envs.core import Step, TextEnv, check_range, normalized

TIE_BREAK_DISCOUNT = 1 - 1e-6
"""Discount factor that breaks ties in favor of the faster action; its other effects are
negligible."""
Transitions = dict[int, dict[int, list[tuple[float, int, float, bool]]]]
"""State -> action -> (probability, next state, reward, terminated) of each outcome."""


class DiscreteToText(TextEnv):
    """A tabular environment with text observations and actions.

    State: a state of the table and the remaining turns. Observation: `describe(state)`. Action: one
    of the words `actions`. Reward and transitions: those of the table. An invalid action uses a
    turn and leaves the state unchanged. Its reward is `invalid_action_reward(...)`, so an invalid
    action is never better than the best legal one. The episode terminates with a terminal
    transition of the table, or after `max_turns` actions. Optimum: computed by backward induction
    over the transition table, for the finite horizon.

    Args:
        table: An environment with a transition table `P` and an initial distribution
            `initial_state_distrib`, in gymnasium's toy_text format.
        describe: Function that returns the description of a state.
        actions: A word for each action, in the order of the table.
        max_turns: Maximum number of actions in an episode.
        system_prompt: Instructions for the agent.
    """

    def __init__(
        self,
        table: Any,
        describe: Callable[[int], str],
        *,
        actions: Sequence[str],
        max_turns: int,
        system_prompt: str,
        render_mode: str | None = None,
    ) -> None:
        check_range("max_turns", max_turns, 1, 1000)
        super().__init__(max_turns=max_turns, render_mode=render_mode)
        self.system_prompt = system_prompt
        self._table, self._describe, self._action_words = table, describe, tuple(actions)
        self._transitions: Transitions = table.P
        self._initial_distribution = np.asarray(table.initial_state_distrib, dtype=float)
        self._state = int(self._initial_distribution.argmax())
        self.invalid_reward = invalid_action_reward(self._transitions)
        self._values_by_discount: dict[float, np.ndarray] = {}

    def start(self) -> str:
        self._state = int(categorical_sample(self._initial_distribution, self.np_random))
        return self._observation_text()

    def step(self, action: str) -> Step:
        word = normalized(action)
        self.turns_left -= 1
        if word not in self._action_words:
            text = self._observation_text(f"Answer with one of: {', '.join(self._action_words)}. ")
            return self.turn(text, self.invalid_reward, valid=False, reason="no such action")
        outcomes = self._transitions[self._state][self._action_words.index(word)]
        draw = self.np_random.random()
        bounds = itertools.accumulate(chance for chance, *_ in outcomes[:-1])
        _, self._state, reward, ended = outcomes[sum(draw >= bound for bound in bounds)]
        success = ended and self._is_goal(reward)
        text = self._observation_text(self._event_text(reward, success))
        return self.turn(text, float(reward), ended, success=success)

    def _observation_text(self, event: str = "") -> str:
        """Return the observation: the event, the state and the number of remaining turns."""
        return f"{event}{self._describe(self._state)} {self.turns_left_text()}"

    def _event_text(self, reward: float, success: bool) -> str:
        """Return text on the transition that is not in the description of the new state."""
        return ""

    def _is_goal(self, reward: float) -> bool:
        """Return whether a terminal transition with this reward is a success."""
        return reward > 0

    def legal_actions(self) -> list[str]:
        return list(self._action_words)

    def action_values(self) -> dict[str, float]:
        after = self._optimal_values_by_turns_left()[max(self.turns_left - 1, 0)]
        totals = self._one_step_lookahead(self._state, after)
        return dict(zip(self._action_words, totals, strict=True))

    def best_action(self) -> str:
        """Return an optimal action.

        Of several optimal actions, the action that reaches its reward first is returned.
        """
        discount = TIE_BREAK_DISCOUNT
        after = discount * self._optimal_values_by_turns_left(discount)[max(self.turns_left - 1, 0)]
        return self._action_words[int(np.argmax(self._one_step_lookahead(self._state, after)))]

    def optimal_value(self) -> float:
        return float(self._initial_distribution @ self._optimal_values_by_turns_left()[-1])

    def random_value(self) -> float:
        values = np.zeros(len(self._initial_distribution))
        for _ in range(self.max_turns):
            states = range(len(values))
            values = np.array([np.mean(self._one_step_lookahead(s, values)) for s in states])
        return float(self._initial_distribution @ values)

    def _optimal_values_by_turns_left(self, discount: float = 1.0) -> np.ndarray:
        """Return the optimal value of each of S states, [max_turns + 1, S], by remaining turns."""
        if discount not in self._values_by_discount:
            rows = [np.zeros(len(self._initial_distribution))]
            for _ in range(self.max_turns):
                states, after = range(len(self._initial_distribution)), discount * rows[-1]
                rows.append(np.array([max(self._one_step_lookahead(s, after)) for s in states]))
            self._values_by_discount[discount] = np.array(rows)
        return self._values_by_discount[discount]

    def _one_step_lookahead(self, state: int, next_state_values: np.ndarray) -> list[float]:
        """Return the value of each action in `state`, given the values of all next states."""
        return [
            sum(p * (r + (0.0 if ended else next_state_values[s])) for p, s, r, ended in row)
            for row in self._transitions[state].values()
        ]


def invalid_action_reward(transitions: Transitions) -> float:
    """Return a reward with which an invalid action is never better than the best legal action.

    The reward is the smaller of 0 and the minimum over states of the highest expected reward of one
    step. A policy that omits an invalid action has one more turn at the end of the episode. In this
    turn, the legal action with the highest expected reward earns at least this reward on average.
    """
    best = (
        max(sum(p * reward for p, _, reward, _ in row) for row in rows.values())
        for rows in transitions.values()
    )
    return float(min(0.0, *best))


class FrozenLake(DiscreteToText):
    """Cross a frozen lake; on slippery ice, two moves out of three go sideways.

    Args:
        slippery: Whether the ice is slippery.
        max_turns: Maximum number of actions in an episode.
    """

    items = "A single map; training and evaluation use the same one."

    def __init__(
        self, slippery: bool = True, max_turns: int = 100, *, render_mode: str | None = None
    ) -> None:
        table = FrozenLakeEnv(is_slippery=slippery)
        rows = [b"".join(row).decode() for row in table.desc]
        super().__init__(
            table,
            lambda state: _describe_cell("".join(rows)[state], state // 4 + 1, state % 4 + 1),
            actions=("left", "down", "right", "up"),
            max_turns=max_turns,
            system_prompt=(
                f"Cross the lake from S to G; H is a hole, F is ice. Map: {' '.join(rows)}. "
                f"{SLIPPERY if slippery else ''}Reaching G pays 1; a hole ends the episode, as do "
                f"{max_turns} turns. Answer left, down, right or up."
            ),
            render_mode=render_mode,
        )


SLIPPERY = "The ice is slippery: two moves out of three go sideways. "


def _describe_cell(cell: str, row: int, column: int) -> str:
    place = f"row {row}, column {column}"
    ends = {"H": f"You drown in the hole at {place}.", "G": f"You reach the goal at {place}."}
    return ends.get(cell, f"You are at {place}.")


class CliffWalking(DiscreteToText):
    """Walk along a cliff: each step costs 1; a fall costs 100 and leads back to the start.

    Args:
        max_turns: Maximum number of actions in an episode.
    """

    items = "A single map; training and evaluation use the same one."

    def __init__(self, max_turns: int = 50, *, render_mode: str | None = None) -> None:
        super().__init__(
            CliffWalkingEnv(),
            lambda state: f"You are at row {state // 12 + 1}, column {state % 12 + 1}.",
            actions=("up", "right", "down", "left"),
            max_turns=max_turns,
            system_prompt=(
                "A grid of 4 rows and 12 columns. Walk from row 4, column 1 to row 4, column 12; "
                "the cells between them are a cliff, and a fall leads back to the start. Each step "
                "costs 1, whatever you answer, a fall 100. The episode ends at the goal, or after "
                f"{max_turns} steps. Answer up, right, down or left."
            ),
            render_mode=render_mode,
        )

    def _is_goal(self, reward: float) -> bool:
        return reward > -100

    def _event_text(self, reward: float, success: bool) -> str:
        return "You fall off the cliff. " if reward <= -100 else ""


class Taxi(DiscreteToText):
    """Fetch a passenger and bring them to their destination.

    Args:
        max_turns: Maximum number of actions in an episode.
    """

    items = "One of 300 starts on one map; starts and states of evaluation are in training too."

    def __init__(self, max_turns: int = 30, *, render_mode: str | None = None) -> None:
        table = TaxiEnv()
        super().__init__(
            table,
            lambda state: _describe_taxi(*table.decode(state)),
            actions=("south", "north", "east", "west", "pickup", "dropoff"),
            max_turns=max_turns,
            system_prompt=(
                "A taxi on 5 by 5 cells. Stops: red (row 1, column 1), green (row 1, column 5), "
                "yellow (row 5, column 1), blue (row 5, column 4). Walls: between columns 2 and 3 "
                "in rows 1 and 2; between columns 1 and 2 and columns 3 and 4 in rows 4 and 5. "
                "Each step costs 1, whatever you answer, an impossible pickup or dropoff 10; "
                f"arrival pays 20. The episode ends with it, or after {max_turns} steps. Answer "
                "south, north, east, west, pickup or dropoff."
            ),
            render_mode=render_mode,
        )

    def _event_text(self, reward: float, success: bool) -> str:
        wrong = "That is not possible here. " if reward <= -10 else ""
        return "The passenger arrives. " if success else wrong


STOPS = ("red", "green", "yellow", "blue")


def _describe_taxi(row: int, column: int, passenger: int, destination: int) -> str:
    location = "in the taxi" if passenger == len(STOPS) else f"at {STOPS[passenger]}"
    return (
        f"The taxi is at row {row + 1}, column {column + 1}. The passenger is {location} and wants "
        f"to go to {STOPS[destination]}."
    )
