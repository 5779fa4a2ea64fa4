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

from rlhf.envs.adapters import PrivateGenerators, check_task_is_offered, import_from_extra
from rlhf.envs.core import Step, TextEnv, check_choice, check_range
from rlhf.envs.items import SPLITS, split_of_text
from rlhf.errors import UserError

MAX_ANSWER_LENGTH = 20_000
"""Longest answer that is scored, in characters; no task needs a longer one."""
NOT_OFFERED = {"composite": "is a mixture of other tasks, which have to be named"}
"""Task that is not offered -> reason."""


def _same_word(answer: str, truth: str) -> float:
    """Return 1.0 if the answer is the reference, ignoring case, else 0.0."""
    return float(answer.strip().lower() == truth.strip().lower())


def _same_number(answer: str, truth: str) -> float:
    """Return 1.0 if the answer is numerically equal to the reference, else 0.0."""
    return float(Fraction(answer.strip().removeprefix("$")) == Fraction(truth))


def _probability_within_tolerance(answer: str, truth: str) -> float:
    """Return 1.0 if the answer differs from `truth` by at most 1e-4 and 1% of `truth`, else 0.0."""
    right = Fraction(truth)
    return float(abs(Fraction(answer.strip()) - right) <= min(Fraction(1, 10_000), right / 100))


def _fraction_of_same_letters(answer: str, truth: str) -> float:
    """Return the fraction of positions with the same letter in both words.

    The denominator is the length of the longer word.
    """
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
    return float(_evaluate_arithmetic(ast.parse(answer.strip(), mode="eval").body) == 24)


def _evaluate_arithmetic(node: ast.expr) -> Fraction:
    """Evaluate an arithmetic expression of integers, +, -, * and /.

    Raises:
        ValueError: The expression contains anything else.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate_arithmetic(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](
            _evaluate_arithmetic(node.left), _evaluate_arithmetic(node.right)
        )
    raise ValueError("the expression may contain only integers, +, -, * and /")


REPLACED_SCORERS: dict[str, tuple[Callable[[str, str], float], str]] = {
    "game_of_life_halting": (_same_word, "its scorer accepts any text: bool('False') is True"),
    "puzzle24": (_makes_24, "its scorer accepts numbers that are not in the question"),
    "coin_flip": (
        _probability_within_tolerance,
        "its scorer accepts any part of the answer's digits",
    ),
    "gsm_symbolic": (_same_number, "its scorer ignores a minus sign and accepts -14 for 14"),
    "spell_backward": (_fraction_of_same_letters, "its scorer ignores letters after the word"),
}
"""Task whose scorer accepts wrong answers -> (replacement scorer, what is wrong). A replacement
scorer may raise an exception for an answer in another form than the reference."""

ANSWER_FORMS = {
    "kakurasu": re.compile(r"[01\s]+"),
    "survo": re.compile(r"[\d\s]+"),
    "tower_of_hanoi": re.compile(r"(\s*Move disk \d+ from Peg \d+ to Peg \d+[.,;]?[ \t]*(\n|$))+"),
}
"""Task whose scorer ignores everything except the numbers or moves in an answer -> pattern that the
whole answer must match."""

STRICT_SCORERS = {"word_ladder"}
"""Tasks with many correct answers whose scorer accepts no text around an answer."""

RUNS_PROGRAMS = {"codeio"}
"""Tasks that run the programs in their questions. These programs write files and may fail, so they
run in a temporary folder, and questions whose program failed are skipped."""
FAILED_PROGRAM = "{}"
"""Reference answer of a question whose program failed."""

_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")
_HEDGES = {"not", "nor", "neither", "never", "or", "either", "maybe", "perhaps", "except"}


def has_extra_or_hedging_text(answer: str, truth: str, question: str = "") -> bool:
    """Return whether an answer contains the reference and further text, or a hedging word.

    Many scorers of reasoning-gym search the reply for the reference, so they accept "not 14" and
    "14 or 7" as 14. The prompt asks for the answer only, so text before, after or between the words
    of the reference is an error. Words of the question are allowed between the words of the
    reference, because a task can have several correct answers.
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
"""Number of candidate questions of an item; the first candidate in the split is used."""
TASKS_DRAWN_AT_CREATION = {"acre"}
"""Tasks that draw all items at creation; each of their items has only one candidate index."""
MAX_TRIES = 300
"""Maximum number of other items that are tried if no candidate of an item is in the split."""
_INDEX_CACHE: dict[tuple[Any, ...], int] = {}
"""(task, size, split, configuration, item) -> dataset index of the item's question; shared by all
environments of this process."""


def tasks() -> list[str]:
    """Return the names of the available tasks."""
    factory = import_from_extra("reasoning_gym.factory", "reasoning-gym")
    return sorted(set(factory.DATASETS) - set(NOT_OFFERED))


class ReasoningGym(TextEnv):
    """Answer one question of a reasoning-gym task.

    State and observation: a question. Action: the answer. Reward: 1.0 if the task's scorer gives
    full credit, else 0.0; with `partial`, the scorer's value in [0, 1]. The reward is also 0.0 in
    these cases: the scorer raises an exception or returns a value that is not finite, or the
    answer is `nan` or `inf`, is longer than `MAX_ANSWER_LENGTH`, or has text around or in the
    reference ("not 14", "14 or 7"). For some tasks, `REPLACED_SCORERS` replaces the scorer, or
    `ANSWER_FORMS` defines the form of an answer.

    reasoning-gym draws item `i` of a dataset with seed `s` from seed `s + i`, so datasets with
    different seeds have nearly all items in common. Many tasks also repeat questions. Questions are
    therefore assigned to a split by a hash. Each item has several candidate questions, and the
    first one in the split is used.

    Args:
        task: A name from `tasks()`.
        split: "train" (the first nine tenths of the items), "test", or "all", which contains
            questions of both.
        size: Number of items. A large number is slow in tasks that draw all items at creation.
        partial: Whether the reward is the scorer's value instead of 0.0 or 1.0.
        config: Further settings of the task, such as its difficulty, with reasoning-gym's names.

    Raises:
        UserError: The task is unknown or not offered, does not accept `config`, or another argument
            is invalid. `reset` raises a UserError if the task has too few questions for the split.
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
        check_task_is_offered(task, tasks(), NOT_OFFERED, "reasoning-gym has no task", "tasks()")
        self.task, self.partial, self.split, self.size = task, partial, split, size
        self._key = (task, size, split, repr(sorted((config or {}).items())))
        self._generators = PrivateGenerators()
        library = import_from_extra("reasoning_gym", "reasoning-gym")
        self._count = size if task in TASKS_DRAWN_AT_CREATION else size * CANDIDATES_PER_ITEM
        with self._generators.active():
            try:
                self._dataset = library.create_dataset(
                    task, seed=0, size=self._count, **(config or {})
                )
            except (AssertionError, TypeError) as error:
                raise UserError(f"{task} does not accept config {config}: {error}") from error
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
        index = self._first_index_in_split(self._indices[int(self._order[position])])
        self._entry = self._dataset_entry_at(index)
        return self.opening(self._entry["question"], item=index)

    def _dataset_entry_at(self, index: int) -> dict[str, Any]:
        """Return the entry of the dataset at an index.

        The index also seeds the private random streams of the global generators, which some tasks
        use.
        """
        self._generators.seed(index)
        with self._isolated_library_calls():
            return self._dataset[index]

    @contextmanager
    def _isolated_library_calls(self) -> Iterator[None]:
        """Return a context manager for calls of the library.

        The library uses private random generators, and its output is discarded.
        """
        with contextlib.ExitStack() as stack:
            if self.task in RUNS_PROGRAMS:
                stack.enter_context(contextlib.chdir(stack.enter_context(TemporaryDirectory())))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(self._generators.active())
            yield

    def _first_index_in_split(self, item: int) -> int:
        """Return the dataset index of the item's first candidate that is usable in the split.

        If there is none, return the index of another item that is usable.

        Raises:
            UserError: No candidate of this item and no other item that was tried is usable.
        """
        if self.split == "all" and self.task not in RUNS_PROGRAMS:
            return item
        key = (*self._key, item)
        if key not in _INDEX_CACHE:
            candidates = range(item, self._count, self.size)
            # In tasks with few questions, all candidates may be equal. Other items are then tried.
            others = ((item + i) % self.size for i in range(min(self.size, MAX_TRIES)))
            for index in itertools.chain(candidates, others):
                if self._is_usable_in_split(self._dataset_entry_at(index)):
                    _INDEX_CACHE[key] = index
                    break
            else:
                raise UserError(
                    f"{self.task} has too few questions for split {self.split}: set split to all"
                )
        return _INDEX_CACHE[key]

    def _is_usable_in_split(self, entry: dict[str, Any]) -> bool:
        """Return whether a question is in the split, and its program, if any, did not fail."""
        if self.task in RUNS_PROGRAMS and entry["answer"] == FAILED_PROGRAM:
            return False
        return self.split in ("all", split_of_text(str(entry["question"])))

    def step(self, action: str) -> Step:
        score, reason = self._score_and_reason(action)
        success = score >= 1.0 - 1e-6
        reward = score if self.partial else float(success)
        return self.turn("", reward, True, success=success, reason=reason, score=score)

    def _score_and_reason(self, action: str) -> tuple[float, str]:
        """Return (score in [0, 1], reason).

        The reason is empty if the scorer returned a finite score. Otherwise it states why the score
        is 0.
        """
        if action.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
            return 0.0, "not an answer"
        truth, question = self._entry.get("answer"), str(self._entry["question"])
        form = ANSWER_FORMS.get(self.task)
        is_malformed = form is not None and form.fullmatch(action.strip()) is None
        if self.task not in STRICT_SCORERS:
            is_malformed |= has_extra_or_hedging_text(
                action, "" if truth is None else str(truth), question
            )
        if len(action) > MAX_ANSWER_LENGTH or is_malformed:
            return 0.0, "not in the form of an answer"
        with self._isolated_library_calls():
            try:
                score = self._raw_score(action)
            except Exception as error:
                # Third-party scorers raise many types of errors on malformed answers.
                return 0.0, f"the scorer raised {type(error).__name__}"
        return (min(max(score, 0.0), 1.0), "") if math.isfinite(score) else (0.0, "no finite score")

    def _raw_score(self, answer: str) -> float:
        """Return the score of the replacement scorer, or else of the library, without checks."""
        if self.task in REPLACED_SCORERS:
            return REPLACED_SCORERS[self.task][0](answer, str(self._entry["answer"]))
        return float(self._dataset.score_answer(answer=answer, entry=self._entry))

    def sample_action(self, rng: np.random.Generator) -> str:
        """Draw one of five generic answers, because the legal answers cannot be listed."""
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
