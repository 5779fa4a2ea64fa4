"""Program synthesis: find a small list program from examples, with feedback.

Programs consist only of the operations in this module; no other code is executed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np

from rlhf.envs.core import Step, TextEnv, check_choice, check_range, normalized
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
VISIBLE_INPUTS = ((3, -1, 4, 4, -5, 1), (2, 0, 7, -3, 2, 6), (-2, 5, 1))
"""Inputs of the examples in the prompt; they are the same in every episode."""


class ProgramSynthesis(TextEnv):
    """Write a pipeline of list operations that reproduces the examples.

    State: a hidden pipeline of `length` operations, uniform over those of the split. Observation:
    three examples; after a wrong program, the first example that the program fails and the
    program's output. Action: operations in order, separated by spaces or `|`. The episode ends with
    the first program that fits all examples, or with the last turn. Reward: 0.0 before the end of
    the episode; at the end, the fraction of hidden tests that the last program passes. Success: the
    program passes all hidden tests. Optimum: by enumeration of all programs on all tests.

    Args:
        length: Number of operations in the hidden program (difficulty); shorter programs are legal
            actions too.
        turns: Maximum number of programs in an episode.
        tests: Number of hidden tests per episode, drawn from a pool of 60.
        split: Hidden programs from which an episode draws: "all", "train" or "test". Programs with
            the same outputs on the examples are in the same split.
    """

    separable = True
    items = "Examples; the evaluation examples do not occur in training."

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
        check_range("tests", tests, 1, len(_test_inputs()))
        super().__init__(max_turns=turns, render_mode=render_mode)
        self.length, self.tests, self.split = length, tests, split
        self.system_prompt = (
            f"Find a program of at most {length} operations that turns each input into its output. "
            f"Operations: {', '.join(OPERATIONS)}. You have {turns} attempts; the first that fits "
            "the examples, or else the last, pays the share of hidden tests that it passes. Answer "
            "with operations in order, such as: sort | double"
        )
        self._begin_episode(("reverse",) * length, list(range(tests)))

    def _begin_episode(self, hidden: Program, test_indices: list[int]) -> None:
        """Start an episode; `test_indices` are indices in `_test_inputs()`."""
        self._hidden, self._tests = hidden, test_indices
        self._fits = _program_indices_by_outputs(self.length)[outputs_on(hidden, VISIBLE_INPUTS)]

    def start(self) -> str:
        hidden = self._draw_hidden_program()
        tests = self.np_random.choice(len(_test_inputs()), size=self.tests, replace=False).tolist()
        self._begin_episode(hidden, tests)
        shown = zip(VISIBLE_INPUTS, outputs_on(self._hidden, VISIBLE_INPUTS), strict=True)
        lines = [f"{_numbers_text(x)} becomes {_numbers_text(y)}" for x, y in shown]
        return "\n".join([*lines, self.turns_left_text()])

    def _draw_hidden_program(self) -> Program:
        if self.split == "all":
            names = list(OPERATIONS)
            indices = self.np_random.integers(len(names), size=self.length).tolist()
            return tuple(names[i] for i in indices)
        candidates = _hidden_program_indices(self.length, self.split)
        return all_programs(self.length)[candidates[int(self.np_random.integers(len(candidates)))]]

    def step(self, action: str) -> Step:
        program = parse_program(action, self.length)
        self.turns_left -= 1
        if program is None:
            operations = ", ".join(OPERATIONS)
            text = f"Write 1 to {self.length} of: {operations}. {self.turns_left_text()}"
            return self.turn(text, 0.0, valid=False, reason="not a program")
        expected = outputs_on(self._hidden, VISIBLE_INPUTS)
        outputs = outputs_on(program, VISIBLE_INPUTS)
        if outputs == expected or self.turns_left == 0:
            passed = self._fraction_passed(program)
            return self.turn("", passed, True, success=passed == 1.0)
        x, y, z = next(
            t for t in zip(VISIBLE_INPUTS, expected, outputs, strict=True) if t[1] != t[2]
        )
        given, wanted, found = map(_numbers_text, (x, y, z))
        text = f"Wrong: {given} must become {wanted}, your program gives {found}."
        return self.turn(f"{text} {self.turns_left_text()}", 0.0)

    def _fraction_passed(self, program: Program) -> float:
        """Return the fraction of the hidden tests of the episode that a program passes."""
        inputs = [_test_inputs()[i] for i in self._tests]
        pairs = zip(outputs_on(program, inputs), outputs_on(self._hidden, inputs), strict=True)
        return sum(a == b for a, b in pairs) / len(inputs)

    def legal_actions(self) -> list[str]:
        return [" | ".join(program) for program in all_programs(self.length)]

    def action_values(self) -> dict[str, float]:
        """Return the value of each program, a mean over the possible hidden programs.

        The possible hidden programs are those that fit the examples. Before the last turn, a
        program that does not fit the examples neither ends the episode nor gives information, so
        its value equals the value of the best program.
        """
        values = _expected_pass_rates(self.length, self._fits)
        if self.turns_left > 1:
            is_wrong = np.ones(len(values), dtype=bool)
            is_wrong[list(self._fits)] = False
            values = np.where(is_wrong, values.max(), values)
        return dict(zip(self.legal_actions(), values.tolist(), strict=True))

    def best_action(self) -> str:
        """Return the program with the highest expected fraction of passed hidden tests.

        Only programs that fit the examples are considered.
        """
        values = _expected_pass_rates(self.length, self._fits)
        return " | ".join(all_programs(self.length)[max(self._fits, key=lambda i: values[i])])

    def optimal_value(self) -> float:
        groups = _index_groups_by_outputs(self.length, self.split)
        best = [_expected_pass_rates(self.length, fits).max() for fits in groups]
        counts = [len(_full_length_indices(self.length, fits)) for fits in groups]
        return float(np.average(best, weights=counts))

    def random_value(self) -> float:
        num_programs, passed = len(all_programs(self.length)), _agreement_matrix(self.length)
        values = []
        for fits in _index_groups_by_outputs(self.length, self.split):
            for hidden in _full_length_indices(self.length, fits):
                # Probability that the last turn is reached, i.e. that no earlier program fits.
                last = (1 - len(fits) / num_programs) ** (self.max_turns - 1)
                earlier = passed[list(fits), hidden].mean() * (1 - last)
                values.append(earlier + last * passed[:, hidden].mean())
        return float(np.mean(values))


def parse_program(action: str, max_length: int) -> Program | None:
    """Return the operations in an action; None if there are none, too many or unknown ones."""
    words = tuple(normalized(action).replace("|", " ").split())
    known = all(word in OPERATIONS for word in words)
    return words if known and 1 <= len(words) <= max_length else None


def run_program(program: Program, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return the output of a program on a list."""
    values = list(numbers)
    for name in program:
        values = OPERATIONS[name](values)
    return tuple(values)


def outputs_on(program: Program, inputs: Any) -> tuple[tuple[int, ...], ...]:
    """Return the outputs of a program on several inputs."""
    return tuple(run_program(program, numbers) for numbers in inputs)


@cache
def all_programs(max_length: int) -> tuple[Program, ...]:
    """List every program of 1 to `max_length` operations."""
    sizes = range(1, max_length + 1)
    return tuple(p for size in sizes for p in itertools.product(OPERATIONS, repeat=size))


@cache
def _test_inputs() -> tuple[tuple[int, ...], ...]:
    """Return the fixed pool of inputs from which the hidden tests are drawn."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 7, size=60).tolist()
    return tuple(tuple(rng.integers(-6, 10, size=size).tolist()) for size in sizes)


@cache
def _program_indices_by_outputs(length: int) -> dict[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Map outputs on the visible inputs to the programs with these outputs.

    Programs are indices in `all_programs(length)`.
    """
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, program in enumerate(all_programs(length)):
        groups.setdefault(outputs_on(program, VISIBLE_INPUTS), []).append(i)
    return {outputs: tuple(indices) for outputs, indices in groups.items()}


@cache
def _index_groups_by_outputs(length: int, split: str) -> list[tuple[int, ...]]:
    """Return the groups of programs with equal outputs on the visible inputs, for a split.

    Groups without a program of `length` operations are left out. Programs are indices in
    `all_programs(length)`.
    """
    groups = [
        (o, fits)
        for o, fits in _program_indices_by_outputs(length).items()
        if _full_length_indices(length, fits)
    ]
    return [fits for _, fits in split_items(groups, split, lambda group: group[0])]


@cache
def _hidden_program_indices(length: int, split: str) -> list[int]:
    """List the indices in `all_programs(length)` of the possible hidden programs of a split."""
    return [
        i
        for fits in _index_groups_by_outputs(length, split)
        for i in _full_length_indices(length, fits)
    ]


def _full_length_indices(length: int, fitting_indices: tuple[int, ...]) -> list[int]:
    """Return the indices in `fitting_indices` of programs with exactly `length` operations."""
    return [i for i in fitting_indices if len(all_programs(length)[i]) == length]


@lru_cache(maxsize=1024)
def _expected_pass_rates(length: int, fitting_indices: tuple[int, ...]) -> np.ndarray:
    """Compute the expected fraction of hidden tests that each of the P programs passes, [P].

    `fitting_indices` are the indices of the programs that fit the examples. The hidden program is
    drawn uniformly from the programs in `fitting_indices` that have `length` operations.
    """
    return _agreement_matrix(length)[:, _full_length_indices(length, fitting_indices)].mean(axis=1)


@cache
def _agreement_matrix(length: int) -> np.ndarray:
    """Compute the fraction of test inputs on which two programs have equal outputs, [P, P]."""
    candidates = all_programs(length)
    codes = np.empty((len(candidates), len(_test_inputs())), dtype=np.int32)
    for test, numbers in enumerate(_test_inputs()):
        seen: dict[tuple[int, ...], int] = {}
        codes[:, test] = [seen.setdefault(run_program(p, numbers), len(seen)) for p in candidates]
    agree = np.zeros((len(candidates), len(candidates)))
    for column in codes.T:
        agree += column[:, None] == column[None, :]
    return agree / len(_test_inputs())


def _numbers_text(numbers: tuple[int, ...]) -> str:
    return f"[{' '.join(map(str, numbers))}]"
