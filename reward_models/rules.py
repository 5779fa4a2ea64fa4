"""Rule-based rewards of the last reply: answers, patterns, formats, length, repetition.

Each function builds a :class:`~rlhf.reward_models.core.Reward`. Its arguments are the settings of
the kind of the same name in a configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction

import regex as timed  # re has no timeout, so a reply could block it forever

from rlhf.errors import UserError
from rlhf.reward_models.core import Conversation, EachReward, Reward, Unscorable, last_reply
from rlhf.reward_models.notation import quantity
from rlhf.reward_models.notation.lexer import NotUnderstood
from rlhf.reward_models.targets import Answer, Target
from rlhf.reward_models.worker import Worker

_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am)? (?:am )?(?:sorry|afraid)\b|i (?:can(?:'|no)t|won't|will not|must decline|"
    r"am (?:not able|unable)|refuse)\b|i'm (?:not able|unable|not comfortable|not going)\b|"
    r"as an ai\b|(?:can|could)(?:'|no)t (?:help|assist|comply|provide|fulfil)|"
    r"not (?:able|willing) to (?:help|assist|provide))"
)


def exact_match(
    answer: Answer | None = None, answers: str | None = None, ignore_case: bool = True
) -> Reward:
    """Reward 1.0 if the reply equals a right answer up to surrounding white space (and case)."""
    target = Target(answer, answers)

    def check(conversation: Conversation) -> float:
        reply, *right = (
            text.strip().casefold() if ignore_case else text.strip()
            for text in (last_reply(conversation), *target.any_of(conversation))
        )
        return float(reply in right)

    return EachReward(check, name="exact_match")


def number(
    answer: Answer | None = None, answers: str | None = None, tolerance: float = 0.0
) -> Reward:
    """Reward 1.0 if the reply's final number equals a right answer; see ``docs/rewards.md``.

    A reference that cannot be parsed as one number gives None with the reason; a reply that cannot
    be parsed scores 0.0.
    """
    if not 0 <= tolerance < float("inf"):
        raise UserError(f"number: tolerance must be >= 0 and finite, got {tolerance}")
    target, margin = Target(answer, answers), Fraction(str(tolerance))

    def check(conversation: Conversation) -> float:
        references, reply = target.any_of(conversation), last_reply(conversation)
        right, reasons = [], []
        for reference in references:
            try:
                right.append(quantity.read_reference_quantity(reference))
            except NotUnderstood as reason:
                reasons.append(str(reason))
        value = None
        with suppress(NotUnderstood):
            value = quantity.read_final_quantity(reply) if right else None
        if value is not None and any(r.matches(value, tolerance=margin) for r in right):
            return 1.0
        return _zero_unless(reasons)

    return EachReward(check, name="number")


def _zero_unless(reasons: Sequence[str]) -> float:
    """Return 0.0, or raise Unscorable if a reference, which may be right, was not parsed."""
    if reasons:
        raise Unscorable(f"the reference answer is not understood: {reasons[0]}")
    return 0.0


def math(answer: Answer | None = None, answers: str | None = None, timeout: float = 10.0) -> Reward:
    """Reward 1.0 if the reply's final expression equals a right answer (LaTeX or plain text).

    Both are parsed by a grammar and compared by sympy, in a separate process; see
    ``docs/rewards.md``. A reply that needs more than ``timeout`` seconds of CPU time is wrong. A
    reply on which the process dies, or runs three times as long by the wall clock, has no score.
    """
    target = Target(answer, answers)
    worker = Worker("rlhf.reward_models.math_check:verdict", timeout=3.0 * timeout)

    def check(conversation: Conversation) -> float:
        reply, reasons = last_reply(conversation), []
        for reference in target.any_of(conversation):
            verdict, reason = worker(reference, reply, timeout)
            if verdict == "right":
                return 1.0
            if verdict == "reference":
                reasons.append(reason)
        return _zero_unless(reasons)

    return EachReward(check, name="math")


def regex(
    pattern: str, full: bool = False, ignore_case: bool = False, timeout: float = 1.0
) -> Reward:
    """Reward 1.0 if ``pattern`` occurs in the reply (with ``full``: matches the whole reply).

    ``.`` also matches line breaks. A reply on which the search takes more than ``timeout`` seconds
    has no score.
    """
    if not timeout > 0:
        raise UserError(f"regex: timeout must be > 0 seconds, got {timeout}")
    flags = timed.DOTALL | (timed.IGNORECASE if ignore_case else 0)
    try:
        compiled = timed.compile(pattern, flags)
    except timed.error as error:
        raise UserError(f"regex: {pattern!r} is not a regular expression ({error})") from error
    matches = compiled.fullmatch if full else compiled.search

    def check(conversation: Conversation) -> float:
        try:
            return float(matches(last_reply(conversation), timeout=timeout) is not None)
        except TimeoutError:
            raise Unscorable(f"the pattern takes more than {timeout:g} s") from None

    return EachReward(check, name="regex")


def tags(names: Sequence[str] = ("think", "answer")) -> Reward:
    """Reward 1.0 if the reply consists of ``<a>...</a>`` for the ``names`` in order, else 0.0.

    Each tag occurs once, with only white space between the blocks. This is the format reward of
    DeepSeek-R1 (2501.12948).
    """
    blocks = r"\s*".join(rf"<{re.escape(n)}>.*?</{re.escape(n)}>" for n in names)
    pattern = re.compile(rf"\s*{blocks}\s*", re.DOTALL)
    marks = [mark for n in names for mark in (f"<{n}>", f"</{n}>")]

    def check(conversation: Conversation) -> float:
        reply = last_reply(conversation)
        once = all(reply.count(mark) == 1 for mark in marks)
        return float(once and pattern.fullmatch(reply) is not None)

    return EachReward(check, name="format")


def length(low: int = 0, high: int | None = None, unit: str = "words") -> Reward:
    """Reward 0.0 for ``low`` to ``high`` words (or characters), negative for other lengths.

    A shorter reply scores length / low - 1, a longer one 1 - length / high, but at least -1.
    """
    if unit not in ("words", "characters"):
        raise UserError(f"length: unit must be 'words' or 'characters', got {unit!r}")
    if low < 0 or (high is not None and high < max(low, 1)):
        raise UserError(f"length: needs 0 <= low <= high and high >= 1, got {low} and {high}")

    def check(conversation: Conversation) -> float:
        reply = last_reply(conversation)
        size = len(reply.split()) if unit == "words" else len(reply)
        if size < low:
            return size / low - 1.0
        return max(-1.0, 1.0 - size / high) if high is not None and size > high else 0.0

    return EachReward(check, name="length")


def repetition(n: int = 3) -> Reward:
    """Penalize repetition: minus the fraction of word ``n``-grams that occurred earlier."""
    if n < 1:
        raise UserError(f"repetition: n must be >= 1, got {n}")

    def check(conversation: Conversation) -> float:
        words = last_reply(conversation).casefold().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    return EachReward(check, name="repetition")


def refusal() -> Reward:
    """Reward 1.0 if the reply's first 200 characters match a pattern of refusals, else 0.0.

    The signal is weak: the pattern matches few replies and is often wrong. Use it to monitor
    training, or as a penalty with a weight.
    """

    def check(conversation: Conversation) -> float:
        opening = last_reply(conversation)[:200].casefold().replace("’", "'")
        return float(_REFUSAL.search(opening) is not None)

    return EachReward(check, name="refusal")
