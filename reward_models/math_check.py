"""Verify mathematical answers; ``rules.math`` calls these functions in a worker process."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from rlhf.reward_models.notation import algebra
from rlhf.reward_models.notation.grammar import Node, parse_answer
from rlhf.reward_models.notation.lexer import NotUnderstood
from rlhf.reward_models.notation.marks import marked_answer
from rlhf.reward_models.notation.prose import (
    answer_segment,
    check_is_asserted,
    final_statement,
)
from rlhf.reward_models.notation.quantity import leading_unit_words
from rlhf.reward_models.notation.units import with_powers_before_units

_ANSWER_IS = re.compile(r"\banswer\s*(?:is|:|=)\s*:?\s*([^\n]{1,200})", re.I)

_WORDS = re.compile(r"\A[^\W\d_]+(?: [^\W\d_]+){0,3}\.?\Z")


class _TimeLimitExceeded(Exception):
    """Raised when the CPU time limit is exceeded."""


def answer_verdict_and_reason(
    reference: str, reply: str, cpu_seconds: float | None = None
) -> tuple[str, str]:
    """Compare the final answer of a reply with a reference answer.

    Args:
        reference: The correct answer, in LaTeX or plain text.
        reply: Reply of a policy.
        cpu_seconds: Limit of the CPU time, in seconds, for parsing the reference; the same limit
            holds again for parsing the reply and comparing the two. None means no limit.

    Returns:
        - ``right``, ``wrong``, or ``reference`` if the reference cannot be parsed, has no value, or
          exceeds the time limit.
        - The reason, which is empty for ``right``.
    """
    failure = "reference"
    try:
        with _cpu_time_limit(cpu_seconds):
            right = parse_reference_answer(reference)
        failure = "wrong"
        with _cpu_time_limit(cpu_seconds):
            equals = algebra.same_answer(
                right, parse_reply_answer(reply, allow_words=_is_words_or_letter(right))
            )
    except NotUnderstood as reason:
        return failure, str(reason)
    except _TimeLimitExceeded:
        return failure, "the CPU time limit was exceeded"
    except Exception as error:  # such as an error of sympy in a computation
        return failure, f"{type(error).__name__}: {error}"
    return ("right", "") if equals else ("wrong", "the values differ")


@lru_cache(maxsize=4096)
def parse_reference_answer(text: str) -> Node:
    """Parse a reference answer and check that it has a value.

    Raises:
        NotUnderstood: A part of the text cannot be parsed, or sympy cannot compute the value.
    """
    answer = marked_answer(text).text.strip()
    tree = parse_answer(with_powers_before_units(answer))
    try:
        algebra.check_reference_has_value(tree)
    except (NotUnderstood, _TimeLimitExceeded):
        raise
    except Exception as error:
        raise NotUnderstood(f"{type(error).__name__}: {error}") from error
    return tree


def _is_words_or_letter(answer: Node) -> bool:
    """Return whether an answer consists of words, or is one letter as in multiple choice."""
    is_letter = answer.kind in ("symbol", "constant") and len(str(answer.data)) == 1
    return answer.kind == "text" or is_letter


def parse_reply_answer(reply: str, *, allow_words: bool = False) -> Node:
    """Parse the final answer of a reply.

    Args:
        reply: Reply of a policy.
        allow_words: Whether the correct answer consists of words or is one letter. If so, the reply
            may also state its answer after "the answer is", or consist of up to four words.

    Raises:
        NotUnderstood: There is no answer, it cannot be parsed, or it is ambiguous or not asserted.
    """
    segment = answer_segment(reply)
    text, boxed = segment.text, segment.is_boxed
    try:
        return parse_answer(text, in_math_mode=boxed)
    except NotUnderstood:
        if segment.is_formula:
            raise
        if allow_words and (answers := [*_ANSWER_IS.finditer(text)]):
            check_is_asserted(text[: answers[-1].start()])
            return parse_answer(rf"\text{{{answers[-1][1]}}}", in_math_mode=False)
        if allow_words and _WORDS.match(text):
            return parse_answer(rf"\text{{{text}}}", in_math_mode=False)
    statement = final_statement(text, numbers_only=False)
    return parse_answer(
        f"{statement.text} {leading_unit_words(statement.words)}", in_math_mode=boxed
    )


@contextmanager
def _cpu_time_limit(seconds: float | None) -> Iterator[None]:
    """Return a context manager that raises ``_TimeLimitExceeded`` after ``seconds`` of CPU time.

    There is no limit if ``seconds`` is None, or if the current thread is not the main thread.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_time_limit_exceeded(*_: object) -> None:
        raise _TimeLimitExceeded

    before = signal.signal(signal.SIGPROF, raise_time_limit_exceeded)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)
