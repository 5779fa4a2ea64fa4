"""Program synthesis: find a small list program from examples, with feedback. Nothing is executed
but
the few operations below."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np

from rlhf.envs.core import Step, TextEnv, check_choice, check_range, plain, turns_left
from rlhf.envs.items import SPLITS, split_items

OPERATIONS: dict[str, Callable[[list[int]], list[int]]] = {
    "reverse": lambda xs: xs[::-1],
    "sort": sorted,
    "double": lambda xs: [2 * x for x in xs],
    "increment": lambda xs: [x + 1 for x in xs],
    "negate": lambda xs: [-x for x in xs],
    "square": lambda xs: [x * x for x in xs],
    "evens": lambda xs: [x for x in xs if x % 2 == 0],
    "positives": lambda xs: [x for x in xs if x > 0],
    "unique": lambda xs: list(dict.fromkeys(xs)),
    "tail": lambda xs: xs[1:],
    "sums": lambda xs: list(itertools.accumulate(xs)),
}
Program = tuple[str, ...]
VISIBLE = ((3, -1, 4, 4, -5, 1), (2, 0, 7, -3, 2, 6), (-2, 5, 1))
"""Inputs whose outputs are shown; the same in every episode."""


class ProgramSynthesis(TextEnv):
    """Write a pipeline of list operations that does what the examples show.

    State: a hidden pipeline of `length` operations, uniform over all of them. Observation: three
    examples; after a wrong program, the first example that it gets wrong and what it gave. Action:
    operations in order, separated by blanks or `|`. The episode ends with the first program that
    fits all examples, or with the last turn. Reward: then the share of hidden tests that this
    program passes; 0.0 before. Success: all of them. Optimum: by enumeration of every program on
    every test.

    Args:
        length: Operations in the hidden program (difficulty); programs up to this length are legal.
        turns: Programs that may be tried.
        tests: Hidden tests per episode, drawn from a pool of 60.
        split: "all" hidden programs, or those of "train" or "test"; programs that the examples do
            not tell apart are on one side.
    """

    separable = True
    items = "Examples; those of evaluation are not in training."

    def __init__(
        self,
        length: int = 2,
        *,
        turns: int = 4,
        tests: int = 8,
        split: str = "all",
        render_mode: str | None = None,
    ) -> None:
        check_choice("split", split, SPLITS)
        check_range("length", length, 1, 3)
        check_range("turns", turns, 1, 20)
        check_range("tests", tests, 1, len(_pool()))
        super().__init__(render_mode=render_mode)
        self.length, self.max_turns, self.tests, self.split = length, turns, tests, split
        self.system_prompt = (
            f"Find a program of at most {length} operations that turns each input into its output. "
            f"Operations: {', '.join(OPERATIONS)}. You have {turns} attempts; the first that fits "
            "the examples, or else the last, pays the share of hidden tests that it passes. Answer "
            "with operations in order, such as: sort | double"
        )
        self._begin(("reverse",) * length, list(range(tests)))

    def _begin(self, hidden: Program, tests: list[int]) -> None:
        self._hidden, self._tests, self._left = hidden, tests, self.max_turns
        self._fits = _fitting(self.length)[outputs_on(hidden, VISIBLE)]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        hidden = self._drawn()
        tests = self.np_random.choice(len(_pool()), size=self.tests, replace=False).tolist()
        self._begin(hidden, tests)
        shown = zip(VISIBLE, outputs_on(self._hidden, VISIBLE), strict=True)
        lines = [f"{_text(x)} becomes {_text(y)}" for x, y in shown]
        return self.opening("\n".join([*lines, turns_left(self._left)]))

    def _drawn(self) -> Program:
        if self.split == "all":
            names = list(OPERATIONS)
            chosen = self.np_random.integers(len(names), size=self.length).tolist()
            return tuple(names[i] for i in chosen)
        places = _hidden(self.length, self.split)
        return programs(self.length)[places[int(self.np_random.integers(len(places)))]]

    def step(self, action: str) -> Step:
        program = parse(action, self.length)
        self._left -= 1
        last = self._left == 0
        if program is None:
            operations = ", ".join(OPERATIONS)
            text = f"Write 1 to {self.length} of: {operations}. {turns_left(self._left)}"
            return self.turn(text, 0.0, last, valid=False, reason="not a program")
        wanted = outputs_on(self._hidden, VISIBLE)
        got = outputs_on(program, VISIBLE)
        if got == wanted or last:
            share = self._share_passed(program)
            return self.turn("", share, True, success=share == 1.0)
        x, y, z = next(t for t in zip(VISIBLE, wanted, got, strict=True) if t[1] != t[2])
        text = f"Wrong: {_text(x)} must become {_text(y)}, your program gives {_text(z)}."
        return self.turn(f"{text} {turns_left(self._left)}", 0.0, False)

    def _share_passed(self, program: Program) -> float:
        inputs = [_pool()[i] for i in self._tests]
        pairs = zip(outputs_on(program, inputs), outputs_on(self._hidden, inputs), strict=True)
        return sum(a == b for a, b in pairs) / len(inputs)

    def legal_actions(self) -> list[str]:
        return [" | ".join(program) for program in programs(self.length)]

    def sample_action(self, rng: np.random.Generator) -> str:
        everything = programs(self.length)
        return " | ".join(everything[int(rng.integers(len(everything)))])

    def action_values(self) -> dict[str, float]:
        """Over the hidden programs that the examples leave possible.

        A program that does not fit the examples ends nothing before the last turn, and tells
        nothing new; what follows it is the best of all.
        """
        values = _chances(self.length, self._fits)
        if self._left > 1:
            waiting = np.ones(len(values), dtype=bool)
            waiting[list(self._fits)] = False
            values = np.where(waiting, values.max(), values)
        return dict(zip(self.legal_actions(), values.tolist(), strict=True))

    def best_action(self) -> str:
        """The program most likely to pass among those that fit the examples."""
        values = _chances(self.length, self._fits)
        return " | ".join(programs(self.length)[max(self._fits, key=lambda i: values[i])])

    def optimal_value(self) -> float:
        groups = _groups(self.length, self.split)
        best = [_chances(self.length, fits).max() for fits in groups]
        counts = [len(_possible(self.length, fits)) for fits in groups]
        return float(np.average(best, weights=counts))

    def random_value(self) -> float:
        everything, passed = programs(self.length), _agreement(self.length)
        values = []
        for fits in _groups(self.length, self.split):
            for hidden in _possible(self.length, fits):
                hit = len(fits) / len(everything)
                waiting = (1 - hit) ** (self.max_turns - 1)
                earlier = passed[list(fits), hidden].mean() * (1 - waiting)
                values.append(earlier + waiting * passed[:, hidden].mean())
        return float(np.mean(values))


def parse(action: str, length: int) -> Program | None:
    """The operations named in an action, or None if there are none, too many or unknown ones."""
    words = tuple(plain(action).replace("|", " ").split())
    known = all(word in OPERATIONS for word in words)
    return words if known and 1 <= len(words) <= length else None


def run(program: Program, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """What a program makes of a list."""
    values = list(numbers)
    for name in program:
        values = OPERATIONS[name](values)
    return tuple(values)


def outputs_on(program: Program, inputs: Any) -> tuple[tuple[int, ...], ...]:
    """A program's outputs on several inputs."""
    return tuple(run(program, numbers) for numbers in inputs)


@cache
def programs(length: int) -> tuple[Program, ...]:
    """Every program of 1 to `length` operations."""
    sizes = range(1, length + 1)
    return tuple(p for size in sizes for p in itertools.product(OPERATIONS, repeat=size))


@cache
def _pool() -> tuple[tuple[int, ...], ...]:
    """The fixed inputs from which hidden tests are drawn."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 7, size=60).tolist()
    return tuple(tuple(rng.integers(-6, 10, size=size).tolist()) for size in sizes)


@cache
def _fitting(length: int) -> dict[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Places in `programs(length)`, grouped by what they show on the visible inputs."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, program in enumerate(programs(length)):
        groups.setdefault(outputs_on(program, VISIBLE), []).append(i)
    return {outputs: tuple(places) for outputs, places in groups.items()}


@cache
def _groups(length: int, split: str) -> list[tuple[int, ...]]:
    """The sets of programs that show alike, one of which at least may be hidden, of a split."""
    groups = [(o, fits) for o, fits in _fitting(length).items() if _possible(length, fits)]
    return [fits for _, fits in split_items(groups, split, lambda group: group[0])]


@cache
def _hidden(length: int, split: str) -> list[int]:
    """Places of the programs that may be hidden in a split."""
    return [i for fits in _groups(length, split) for i in _possible(length, fits)]


def _possible(length: int, fits: tuple[int, ...]) -> list[int]:
    """Those of the places that may be the hidden program, which has exactly `length` operations."""
    return [i for i in fits if len(programs(length)[i]) == length]


@lru_cache(maxsize=1024)
def _chances(length: int, fits: tuple[int, ...]) -> np.ndarray:
    """[P]: expected share of hidden tests that each program passes, given the examples."""
    return _agreement(length)[:, _possible(length, fits)].mean(axis=1)


@cache
def _agreement(length: int) -> np.ndarray:
    """[P, P]: share of the pool on which two programs agree."""
    everything = programs(length)
    codes = np.empty((len(everything), len(_pool())), dtype=np.int32)
    for test, numbers in enumerate(_pool()):
        seen: dict[tuple[int, ...], int] = {}
        codes[:, test] = [seen.setdefault(run(p, numbers), len(seen)) for p in everything]
    agree = np.zeros((len(everything), len(everything)))
    for column in codes.T:
        agree += column[:, None] == column[None, :]
    return agree / len(_pool())


def _text(numbers: tuple[int, ...]) -> str:
    return f"[{' '.join(map(str, numbers))}]"
