"""reasoning-gym: a hundred procedural tasks of one question (needs the extra `reasoning-gym`)."""

from __future__ import annotations

import ast
import difflib
import itertools
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from rlhf.envs.adapters import PrivateGenerators, require
from rlhf.envs.core import Step, TextEnv, check_choice, check_range
from rlhf.envs.items import SPLITS, half_of
from rlhf.errors import UserError

MAX_ANSWER = 20_000
"""Characters of an answer; no task asks for as many."""
QUARANTINE = {"composite": "is a mixture of other tasks, which have to be named"}
"""Tasks that are not offered, and why."""


def _same_word(answer: str, truth: str) -> float:
    return float(answer.strip().lower() == truth.strip().lower())


def _same_number(answer: str, truth: str) -> float:
    return float(abs(Fraction(answer.strip()) - Fraction(truth)) <= Fraction(1, 10_000))


_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _makes_24(answer: str, truth: str) -> float:
    """Whether ``answer`` makes 24 of the numbers that the reference uses, each of them once."""
    numbers = [sorted(re.findall(r"\d+", text)) for text in (answer, truth)]
    if numbers[0] != numbers[1] or len(answer) > 200:
        return 0.0
    return float(_value(ast.parse(answer.strip(), mode="eval").body) == 24)


def _value(node: ast.expr) -> Fraction:
    """The value of an expression of whole numbers and the four operations.

    Raises:
        ValueError: it holds something else.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("neither a number nor one of the four operations")


HARDENED: dict[str, tuple[Callable[[str, str], float], str]] = {
    "game_of_life_halting": (_same_word, "its scorer pays for any text: bool('False') is True"),
    "puzzle24": (_makes_24, "its scorer pays for other numbers than the question's"),
    "coin_flip": (_same_number, "its scorer pays for any part of the answer's digits"),
}
"""Tasks whose own scorer pays for wrong answers: a scorer in its place, and why."""

_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")
_HEDGES = {"not", "nor", "neither", "never", "or", "either", "maybe", "perhaps", "except"}


def has_junk(answer: str, truth: str) -> bool:
    """Whether words or numbers stand around the reference, or words that take the answer back.

    Many scorers of reasoning-gym search the reply for the reference: "not 14" and "14 or 7" are
    paid for 14. The prompt asks for the answer only, so nothing may stand beside it.
    """
    given = _TOKEN.findall(answer.casefold())
    right = _TOKEN.findall(truth.casefold())
    if _HEDGES & set(given) - set(right):
        return True
    if not right:  # a reference of other symbols, or none
        return bool(given and truth.strip())
    extra = len(given) - len(right)
    return extra > 0 and any(given[i : i + len(right)] == right for i in range(extra + 1))


CANDIDATES = 8
"""Indices that each item may be drawn from."""
EAGER = {"acre"}
"""Tasks that draw all items at once, so that each has only its own index."""
MAX_TRIES = 300
_PLACES: dict[tuple[Any, ...], int] = {}
"""Where items were found, for all environments of this process."""


def tasks() -> list[str]:
    """The names of all tasks on offer."""
    factory = require("reasoning_gym.factory", "reasoning-gym")
    return sorted(set(factory.DATASETS) - set(QUARANTINE))


class ReasoningGym(TextEnv):
    """One question of a reasoning-gym task, one answer.

    State and observation: a question. Action: the answer. Reward: 1.0 where the task's scorer is
    fully satisfied, else 0.0; with `partial` what the scorer says, in [0, 1]. Scorers are hardened:
    one that raises, or says nothing finite, pays 0.0; `nan` and `inf` are no answers; text
    around the reference ("not 14", "14 or 7") pays 0.0; `HARDENED` replaces some.

    Items `i` of a data set with seed `s` are drawn with seed `s + i`, so another seed shares nearly
    all items, and in many tasks other indices repeat questions. So a hash of its text decides on
    which side a question is, and each item of a split is the first of its candidates on that side.

    Args:
        task: A name from `tasks()`.
        split: "train" (the first nine tenths of the items), "test", or "all", which shares
            questions with both.
        size: Items in all; tasks that draw all items at once need time for many.
        partial: Whether partial credit is paid.
        config: Further settings of the task (its difficulty), as reasoning-gym names them.

    Raises:
        UserError: an unknown or quarantined task, or settings that it does not take; at reset, a
            task whose questions are too few to be split.
    """

    best_score = 1.0
    max_turns = 1
    system_prompt = "Answer the question. Reply with the answer only."

    separable = True
    items = "A question; questions of evaluation are not in training."

    def __init__(
        self,
        task: str = "chain_sum",
        *,
        split: str = "train",
        size: int = 1000,
        partial: bool = False,
        config: dict[str, Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        check_choice("split", split, SPLITS)
        check_range("size", size, 10, 10**9)
        super().__init__(render_mode=render_mode)
        _check_task(task)
        self.task, self.partial, self.split, self.size = task, partial, split, size
        self._key = (task, size, split, repr(sorted((config or {}).items())))
        self._generators = PrivateGenerators()
        library = require("reasoning_gym", "reasoning-gym")
        with self._generators.active():
            try:
                count = size if task in EAGER else size * CANDIDATES
                self._items = library.create_dataset(task, seed=0, size=count, **(config or {}))
            except (AssertionError, TypeError) as error:
                raise UserError(f"{task} does not take config {config}: {error}") from error
        train = size * 9 // 10
        self._indices = {
            "train": range(train),
            "test": range(train, size),
            "all": range(size),
        }[split]
        self._order = np.random.default_rng(0).permutation(len(self._indices))
        self._entry: dict[str, Any] = {"question": "", "answer": None}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        count = len(self._indices)
        place = int(self.np_random.integers(count)) if seed is None else seed % count
        index = self._place(self._indices[int(self._order[place])])
        self._entry = self._draw(index)
        return self.opening(self._entry["question"], item=index)

    def _draw(self, index: int) -> dict[str, Any]:
        """An item; some tasks draw from the global generators, whose state then is part of it."""
        self._generators.seed(index)
        with self._generators.active():
            return self._items[index]

    def _place(self, item: int) -> int:
        """The index of the first candidate for an item whose question is on this split's side."""
        if self.split == "all":
            return item
        key = (*self._key, item)
        if key not in _PLACES:
            own = range(
                item, self.size if self.task in EAGER else self.size * CANDIDATES, self.size
            )
            # Where questions are few, all candidates may be one; then any other will do.
            others = ((item + i) % self.size for i in range(min(self.size, MAX_TRIES)))
            for index in itertools.chain(own, others):
                if half_of(str(self._draw(index)["question"])) == self.split:
                    _PLACES[key] = index
                    break
            else:
                raise UserError(
                    f"{self.task} has too few questions to hold any out: set split to all"
                )
        return _PLACES[key]

    def step(self, action: str) -> Step:
        score, reason = self._score(action)
        success = score >= 1.0 - 1e-6
        paid = score if self.partial else float(success)
        return self.turn("", paid, True, success=success, reason=reason, score=score)

    def _score(self, action: str) -> tuple[float, str]:
        """The scorer's verdict in [0, 1], and what was wrong with the answer or the scorer."""
        if action.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
            return 0.0, "not an answer"
        truth = self._entry.get("answer")
        if len(action) > MAX_ANSWER or has_junk(action, "" if truth is None else str(truth)):
            return 0.0, "text around the answer"
        with self._generators.active():
            try:
                score = float(self._scorer()(action))
            except Exception as error:
                # Foreign scorers raise all sorts of errors on odd answers.
                return 0.0, f"the scorer raised {type(error).__name__}"
        return (min(max(score, 0.0), 1.0), "") if math.isfinite(score) else (0.0, "no finite score")

    def _scorer(self) -> Callable[[str], float]:
        if self.task in HARDENED:
            scorer, truth = HARDENED[self.task][0], str(self._entry["answer"])
            return lambda answer: scorer(answer, truth)
        return lambda answer: self._items.score_answer(answer=answer, entry=self._entry)

    def sample_action(self, rng: np.random.Generator) -> str:
        """Answers have no list; one of a few that could be one."""
        return str(rng.choice(["0", "1", "yes", "no", "I do not know"]))

    def best_action(self) -> str:
        """The reference answer.

        Raises:
            NotImplementedError: the task has none (it accepts several answers).
        """
        answer = self._entry.get("answer")
        if answer is None:
            raise NotImplementedError(f"{self.task} has no reference answer")
        return str(answer)

    def optimal_value(self) -> float:
        return self.best_score


def _check_task(task: str) -> None:
    """Raise a UserError that names the nearest tasks when there is no such one."""
    if task in QUARANTINE:
        raise UserError(f"{task} is not offered: it {QUARANTINE[task]}")
    known = tasks()
    if task not in known:
        near = ", ".join(difflib.get_close_matches(task, known)) or "see tasks()"
        raise UserError(f"reasoning-gym has no task {task!r}; did you mean {near}?")
