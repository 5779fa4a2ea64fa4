"""Key and door: a small grid world whose subgoals must be reached in the right order."""

from __future__ import annotations

import itertools
from functools import cache, lru_cache

import numpy as np
from scipy.sparse.csgraph import shortest_path

from rlhf.envs.core import Step, TextEnv, check_choice, check_range, normalized
from rlhf.envs.items import SPLITS, split_items
from rlhf.errors import UserError

MOVES: dict[str, tuple[int, int]] = {
    "north": (-1, 0),
    "south": (1, 0),
    "west": (0, -1),
    "east": (0, 1),
}
Cell = tuple[int, int]  # (row, column)
Layout = tuple[Cell, Cell, Cell, Cell]  # start, key, door, goal
Objects = tuple[Cell, Cell, Cell]  # key, door, goal
State = tuple[Cell, bool]  # the agent's cell, and whether it has the key


class KeyDoor(TextEnv):
    """Fetch the key, go through the door and reach the goal in few steps.

    State: a grid of n x n cells whose middle column is a wall with one locked door; agent and key
    are west of the wall, the goal is east of it. Observation: first the map, then the agent's cell.
    Action: north, south, west or east; a wall, or the door without the key, blocks the move. The
    agent picks up the key by walking over it. Reward: `-step_cost` per action, valid or not, and
    +1.0 for reaching the goal. The episode ends at the goal or after `8 n` actions. Optimum:
    shortest paths, averaged over the layouts of the split.

    Args:
        size: Number of rows and columns, n; odd.
        step_cost: Cost of each action.
        split: Layouts from which an episode draws: "all", "train" or "test".
    """

    separable = True
    items = "Maps; the evaluation maps do not occur in training."

    def __init__(
        self,
        size: int = 5,
        step_cost: float = 0.01,
        *,
        split: str = "all",
        render_mode: str | None = None,
    ) -> None:
        check_choice("split", split, SPLITS)
        check_range("size", size, 3, 7)
        if size % 2 == 0:
            raise UserError(f"size must be odd (the wall is the middle column), got {size}")
        check_range("step_cost", step_cost, 0.0, 0.02)
        super().__init__(max_turns=8 * size, render_mode=render_mode)
        self.size, self.step_cost, self.split = size, step_cost, split
        self.system_prompt = (
            "You walk on a grid: A is you, K a key, D a locked door, G the goal, # a wall. Walk "
            "over the key to take it, then through the door to the goal, in few steps: each costs "
            f"{step_cost:g}, the goal pays 1, and you have {self.max_turns}. Answer with one word: "
            "north, south, west or east."
        )
        middle = size // 2
        self._begin_episode(((0, 0), (0, 0), (0, middle), (0, size - 1)))

    def _begin_episode(self, layout: Layout) -> None:
        """Start an episode on a layout."""
        self._layout = layout
        self._cell, self._has_key = layout[0], layout[0] == layout[1]

    def start(self) -> str:
        self._begin_episode(self._draw_layout())
        return self._map_text()

    def _draw_layout(self) -> Layout:
        if self.split != "all":
            layouts = layouts_of_split(self.size, self.split)
            return layouts[int(self.np_random.integers(len(layouts)))]
        west, east = west_and_east_cells(self.size)
        start = int(self.np_random.integers(len(west)))
        key = (start + int(self.np_random.integers(1, len(west)))) % len(west)
        door = (int(self.np_random.integers(self.size)), self.size // 2)
        goal = east[int(self.np_random.integers(len(east)))]
        return west[start], west[key], door, goal

    def step(self, action: str) -> Step:
        word = normalized(action)
        self.turns_left -= 1
        if word not in MOVES:
            text = f"Answer north, south, west or east. {self._location_text()}"
            return self.turn(text, -self.step_cost, valid=False, reason="not a direction")
        before = self._cell, self._has_key
        self._cell, self._has_key = next_state(before, word, self._layout, self.size)
        if self._cell == self._layout[3]:
            return self.turn("You reach the goal.", 1.0 - self.step_cost, True, success=True)
        event = ""
        if self._has_key != before[1]:
            event = "You take the key. "
        elif self._cell == before[0]:
            event = "You cannot go there. "
        return self.turn(event + self._location_text(), -self.step_cost)

    def _location_text(self) -> str:
        row, column = self._cell
        return f"You are at row {row + 1}, column {column + 1}. {self.turns_left_text()}"

    def _map_text(self) -> str:
        start, key, door, goal = self._layout
        letters = {goal: "G", key: "K", start: "A", door: "D"}
        rows = [
            "".join(
                letters.get((r, c), "#" if c == self.size // 2 else ".") for c in range(self.size)
            )
            for r in range(self.size)
        ]
        return "\n".join([*rows, self._location_text()])

    def legal_actions(self) -> list[str]:
        return list(MOVES)

    def action_values(self) -> dict[str, float]:
        steps = distances_to_goal(self._layout[1:], self.size)
        state = self._cell, self._has_key
        values = {}
        for word in MOVES:
            left = steps[next_state(state, word, self._layout, self.size)]
            reached = left <= self.turns_left - 1
            cost = self.step_cost * min(left + 1, self.turns_left)
            values[word] = (1.0 if reached else 0.0) - cost
        return values

    def best_action(self) -> str:
        """Return a step along a shortest path."""
        state, steps = (self._cell, self._has_key), distances_to_goal(self._layout[1:], self.size)
        return min(MOVES, key=lambda word: steps[next_state(state, word, self._layout, self.size)])

    def optimal_value(self) -> float:
        layouts = layouts_of_split(self.size, self.split)
        lengths = [distances_to_goal(layout[1:], self.size)[layout[0], False] for layout in layouts]
        return 1.0 - self.step_cost * sum(lengths) / len(lengths)

    def random_value(self) -> float:
        """Compute the exact value by propagating the distribution over states in each layout."""
        reached, steps = _random_walk_success_and_steps(self.size, self.max_turns, self.split)
        return reached - self.step_cost * steps


def west_and_east_cells(size: int) -> tuple[list[Cell], list[Cell]]:
    """Return the cells west of the wall and the cells east of the wall."""
    middle = size // 2
    west = [(r, c) for r in range(size) for c in range(middle)]
    east = [(r, c) for r in range(size) for c in range(middle + 1, size)]
    return west, east


def all_layouts(size: int) -> list[Layout]:
    """List all layouts of a grid; the agent and the key start in different cells."""
    west, east = west_and_east_cells(size)
    doors = [(r, size // 2) for r in range(size)]
    pairs = itertools.permutations(west, 2)
    return [(s, k, d, g) for (s, k), d, g in itertools.product(pairs, doors, east)]


@cache
def layouts_of_split(size: int, split: str) -> list[Layout]:
    """List the layouts of a split."""
    return split_items(all_layouts(size), split)


@cache
def _state_indices(size: int) -> dict[State, int]:
    """Map each state to its index in arrays over states."""
    states = itertools.product(range(size), range(size), (False, True))
    return {((row, column), has_key): i for i, (row, column, has_key) in enumerate(states)}


def next_state(state: State, word: str, layout: Layout, size: int) -> State:
    """Return the state after a step in the direction `word`.

    The start cell of `layout` is not used.
    """
    (row, column), has_key = state
    down, right = MOVES[word]
    target = (row + down, column + right)
    inside = 0 <= target[0] < size and 0 <= target[1] < size
    wall = target[1] == size // 2 and not (target == layout[2] and has_key)
    if not inside or wall:
        return state
    return target, has_key or target == layout[1]


def _random_step_transitions(objects: Objects, size: int) -> np.ndarray:
    """Compute the transition probabilities of uniformly random steps, [state, next state]."""
    index = _state_indices(size)
    transitions = np.zeros((len(index), len(index)))
    for state, word in itertools.product(index, MOVES):
        target = next_state(state, word, (objects[0], *objects), size)
        transitions[index[state], index[target]] += 1 / len(MOVES)
    return transitions


@lru_cache(maxsize=4096)
def distances_to_goal(objects: Objects, size: int) -> dict[State, float]:
    """Map each state to the length of a shortest path to the goal; infinite if there is no path."""
    index = _state_indices(size)
    backwards, goal = _random_step_transitions(objects, size).T, index[objects[2], True]
    steps = shortest_path(backwards, unweighted=True, indices=goal)
    return dict(zip(index, steps.tolist(), strict=True))


@cache
def _random_walk_success_and_steps(size: int, turns: int, split: str) -> tuple[float, float]:
    """Compute (success probability, mean number of steps) of uniformly random steps.

    The results are means over the layouts of the split, for episodes of at most `turns` steps.
    """
    layouts, index = layouts_of_split(size, split), _state_indices(size)
    # The start only sets the initial distribution; the dynamics depend on key, door and goal.
    initial: dict[Objects, np.ndarray] = {}
    for start, key, door, goal in layouts:
        counts = initial.setdefault((key, door, goal), np.zeros(len(index)))
        counts[index[start, False]] += 1
    reached = steps = 0.0
    for objects, counts in initial.items():
        transition, goal = _random_step_transitions(objects, size), index[objects[2], True]
        for _ in range(turns):
            steps += counts.sum()
            counts = counts @ transition
            reached += counts[goal]
            counts[goal] = 0.0
    return reached / len(layouts), steps / len(layouts)
