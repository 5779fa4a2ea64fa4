"""Adapter for reasoning-gym: about 100 procedural single-question tasks (extra `reasoning-gym`)."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rlhf.envs.adapters import PrivateGenerators, check_offered, require
from rlhf.envs.core import Step, TextEnv, check_choice, check_range
from rlhf.envs.items import SPLITS, split_of_text
from rlhf.errors import UserError

MAX_ANSWER_LENGTH = 20_000
"""Longest answer that is scored, in characters; no task needs a longer one."""
NOT_OFFERED = {"composite": "is a mixture of other tasks, which have to be named"}
"""Task that is not offered -> reason."""


def _same_word(answer: str, truth: str) -> float:
    return float(answer.strip().lower() == truth.strip().lower())


def _same_number(answer: str, truth: str) -> float:
    return float(Fraction(answer.strip().removeprefix("$")) == Fraction(truth))


def _same_probability(answer: str, truth: str) -> float:
    """Return 1.0 if two probabilities differ by at most 1e-4 and 1% of the second, else 0.0."""
    right = Fraction(truth)
    return float(abs(Fraction(answer.strip()) - right) <= min(Fraction(1, 10_000), right / 100))


def _same_letters(answer: str, truth: str) -> float:
    """Return the share of places with the same letter, of the places of the longer word."""
    word, right = answer.strip().lower(), truth.strip().lower()
    return sum(a == b for a, b in zip(word, right, strict=False)) / max(len(word), len(right), 1)


_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _makes_24(answer: str, truth: str) -> float:
    """Return 1.0 if `answer` equals 24 and uses each number of the reference once, else 0.0."""
    numbers = [sorted(re.findall(r"\d+", text)) for text in (answer, truth)]
    if numbers[0] != numbers[1] or len(answer) > 200:
        return 0.0
    return float(_value(ast.parse(answer.strip(), mode="eval").body) == 24)


def _value(node: ast.expr) -> Fraction:
    """Evaluate an expression of integers and the four operations.

    Raises:
        ValueError: The expression contains other operations.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("neither a number nor one of the four operations")


REPLACED_SCORERS: dict[str, tuple[Callable[[str, str], float], str]] = {
    "game_of_life_halting": (_same_word, "its scorer pays for any text: bool('False') is True"),
    "puzzle24": (_makes_24, "its scorer pays for other numbers than the question's"),
    "coin_flip": (_same_probability, "its scorer pays for any part of the answer's digits"),
    "gsm_symbolic": (_same_number, "its scorer ignores a minus sign: -14 is right for 14"),
    "spell_backward": (_same_letters, "its scorer ignores letters after the word"),
}
"""Task whose scorer accepts wrong answers -> a replacement scorer, and the reason."""

ANSWER_FORMS = {
    "kakurasu": re.compile(r"[01\s]+"),
    "survo": re.compile(r"[\d\s]+"),
    "tower_of_hanoi": re.compile(r"(\s*Move disk \d+ from Peg \d+ to Peg \d+[.,;]?[ \t]*(\n|$))+"),
}
"""Task whose scorer ignores all but the numbers or moves in an answer -> form of an answer."""

STRICT_SCORERS = {"word_ladder"}
"""Tasks with many right answers whose scorer accepts no text around an answer."""

RUNS_PROGRAMS = {"codeio"}
"""Tasks that run the programs of their questions, which write files and may fail. They run in a
temporary folder, and questions whose program failed are skipped."""
FAILED_PROGRAM = "{}"
"""Reference answer of a question whose program failed."""

_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")
_HEDGES = {"not", "nor", "neither", "never", "or", "either", "maybe", "perhaps", "except"}


def has_extra_text(answer: str, truth: str, question: str = "") -> bool:
    """Return whether an answer has text around or in the reference, or words that negate it.

    Many scorers of reasoning-gym search the reply for the reference, so they accept "not 14" and
    "14 or 7" as 14. The prompt asks for the answer only, so any further text is an error. A task
    can have several right answers, so words of the question may be added in the reference.
    """
    tokens = _TOKEN.findall(answer.casefold())
    reference = _TOKEN.findall(truth.casefold())
    if _HEDGES & set(tokens) - set(reference):
        return True
    if not reference:  # the reference has no words or numbers
        return bool(tokens and truth.strip())
    extra, size = len(tokens) - len(reference), len(reference)
    if extra > 0 and any(tokens[i : i + size] == reference for i in range(extra + 1)):
        return True
    foreign = set(tokens) - set(reference) - set(_TOKEN.findall(question.casefold()))
    return bool(foreign) and Counter(reference) <= Counter(tokens)


CANDIDATES_PER_ITEM = 8
"""Number of data-set indices from which each item may be drawn."""
TASKS_DRAWN_AT_CREATION = {"acre"}
"""Tasks that draw all items at creation; there each item has one index only."""
MAX_TRIES = 300
_INDEX_CACHE: dict[tuple[Any, ...], int] = {}
"""(task, settings, item) -> index of its question, for all environments of this process."""


def tasks() -> list[str]:
    """Return the names of the available tasks."""
    factory = require("reasoning_gym.factory", "reasoning-gym")
    return sorted(set(factory.DATASETS) - set(NOT_OFFERED))


class ReasoningGym(TextEnv):
    """Answer one question of a reasoning-gym task.

    State and observation: a question. Action: the answer. Reward: 1.0 if the task's scorer gives
    full credit, else 0.0; with `partial` the scorer's value in [0, 1]. Scorers are hardened: an
    exception or a value that is not finite gives 0.0, as do `nan`, `inf` and text around or in
    the reference ("not 14", "14 or 7"); `REPLACED_SCORERS` replaces some scorers, and
    `ANSWER_FORMS` states the form of a whole answer for others.

    reasoning-gym draws item `i` of a data set with seed `s` from seed `s + i`, so data sets with
    different seeds share nearly all items, and many tasks repeat questions. Splits are therefore
    made by a hash of the question, and each item of a split is its first candidate in that split.

    Args:
        task: A name from `tasks()`.
        split: "train" (the first nine tenths of the items), "test", or "all", which shares
            questions with both.
        size: Number of items; tasks that draw all items at creation are slow if it is large.
        partial: Whether to give partial credit.
        config: Further settings of the task (its difficulty), by reasoning-gym's names.

    Raises:
        UserError: The task is unknown or not offered, or does not take the settings; at reset, the
            task has too few questions for a split.
    """

    best_score = 1.0
    system_prompt = "Answer the question. Reply with the answer only."
    separable = True
    items = "A question; the evaluation questions do not occur in training."

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
        check_offered(task, tasks(), NOT_OFFERED, "reasoning-gym has no task", "tasks()")
        self.task, self.partial, self.split, self.size = task, partial, split, size
        self._key = (task, size, split, repr(sorted((config or {}).items())))
        self._generators = PrivateGenerators()
        library = require("reasoning_gym", "reasoning-gym")
        self._count = size if task in TASKS_DRAWN_AT_CREATION else size * CANDIDATES_PER_ITEM
        with self._generators.active():
            try:
                self._dataset = library.create_dataset(
                    task, seed=0, size=self._count, **(config or {})
                )
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
        position = int(self.np_random.integers(count)) if seed is None else seed % count
        index = self._index_of(self._indices[int(self._order[position])])
        self._entry = self._draw(index)
        return self.opening(self._entry["question"], item=index)

    def _draw(self, index: int) -> dict[str, Any]:
        """Draw an item; the index seeds the global generators, which some tasks use."""
        self._generators.seed(index)
        with self._running():
            return self._dataset[index]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Call the library in this context: with private generators, and without output."""
        with contextlib.ExitStack() as stack:
            if self.task in RUNS_PROGRAMS:
                stack.enter_context(contextlib.chdir(stack.enter_context(TemporaryDirectory())))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(self._generators.active())
            yield

    def _index_of(self, item: int) -> int:
        """Return the index of the first candidate for an item whose question is in the split."""
        if self.split == "all" and self.task not in RUNS_PROGRAMS:
            return item
        key = (*self._key, item)
        if key not in _INDEX_CACHE:
            candidates = range(item, self._count, self.size)
            # In tasks with few questions all candidates may be equal; then use other items.
            others = ((item + i) % self.size for i in range(min(self.size, MAX_TRIES)))
            for index in itertools.chain(candidates, others):
                if self._is_in_split(self._draw(index)):
                    _INDEX_CACHE[key] = index
                    break
            else:
                raise UserError(
                    f"{self.task} has too few questions to hold any out: set split to all"
                )
        return _INDEX_CACHE[key]

    def _is_in_split(self, entry: dict[str, Any]) -> bool:
        if self.task in RUNS_PROGRAMS and entry["answer"] == FAILED_PROGRAM:
            return False
        return self.split in ("all", split_of_text(str(entry["question"])))

    def step(self, action: str) -> Step:
        score, reason = self._score(action)
        success = score >= 1.0 - 1e-6
        reward = score if self.partial else float(success)
        return self.turn("", reward, True, success=success, reason=reason, score=score)

    def _score(self, action: str) -> tuple[float, str]:
        """Return a score in [0, 1], and the reason for a score of 0 without scoring, if any."""
        if action.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
            return 0.0, "not an answer"
        truth, question = self._entry.get("answer"), str(self._entry["question"])
        form = ANSWER_FORMS.get(self.task)
        is_malformed = form is not None and form.fullmatch(action.strip()) is None
        if self.task not in STRICT_SCORERS:
            is_malformed |= has_extra_text(action, "" if truth is None else str(truth), question)
        if len(action) > MAX_ANSWER_LENGTH or is_malformed:
            return 0.0, "text around the answer"
        with self._running():
            try:
                score = self._raw_score(action)
            except Exception as error:
                # Third-party scorers raise many types of errors on malformed answers.
                return 0.0, f"the scorer raised {type(error).__name__}"
        return (min(max(score, 0.0), 1.0), "") if math.isfinite(score) else (0.0, "no finite score")

    def _raw_score(self, answer: str) -> float:
        if self.task in REPLACED_SCORERS:
            return REPLACED_SCORERS[self.task][0](answer, str(self._entry["answer"]))
        return float(self._dataset.score_answer(answer=answer, entry=self._entry))

    def sample_action(self, rng: np.random.Generator) -> str:
        """Draw one of five generic answers, because legal answers cannot be listed."""
        return str(rng.choice(["0", "1", "yes", "no", "I do not know"]))

    def best_action(self) -> str:
        """Return the reference answer.

        Raises:
            NotImplementedError: The task accepts several answers and has no reference.
        """
        answer = self._entry.get("answer")
        if answer is None:
            raise NotImplementedError(f"{self.task} has no reference answer")
        return str(answer)

    def optimal_value(self) -> float:
        return self.best_score
