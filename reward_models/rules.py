"""Rewards that are rules about the last reply: answers, patterns, formats, length, repetition.

Every function here builds a :class:`~rlhf.reward_models.core.Reward`. Its arguments are the
settings of the kind of the same name in a configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction

import regex as timed  # re without a deadline could be held for ever by a reply

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
    """1.0 if the reply is a right answer, white space at both ends (and case) ignored."""
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
    """1.0 if the number that the reply states last is a right one; see ``docs/rewards.md``.

    A reference that is not wholly understood as one number gives None with the reason; a reply
    that is not wholly understood scores 0.0.
    """
    target, margin = Target(answer, answers), Fraction(str(tolerance))

    def check(conversation: Conversation) -> float:
        references, reply = target.any_of(conversation), last_reply(conversation)
        right, reasons = [], []
        for reference in references:
            try:
                right.append(quantity.read_reference_quantity(reference))
            except NotUnderstood as reason:
                reasons.append(str(reason))
        given = None
        with suppress(NotUnderstood):
            given = quantity.read_final_quantity(reply) if right else None
        if given is not None and any(r.matches(given, tolerance=margin) for r in right):
            return 1.0
        return _unless_unread(reasons)

    return EachReward(check, name="number")


def _unless_unread(reasons: Sequence[str]) -> float:
    """0.0, unless a reference was not understood: the reply could have been right by that one."""
    if reasons:
        raise Unscorable(f"the reference answer is not understood: {reasons[0]}")
    return 0.0


def math(answer: Answer | None = None, answers: str | None = None, timeout: float = 10.0) -> Reward:
    """1.0 if the reply ends on an expression that equals a right answer (LaTeX or plain).

    A grammar reads both, sympy compares them; see ``docs/rewards.md``. It runs in a killable
    process. A reply on which ``timeout`` seconds of processor time are not enough is wrong, and
    one on which the process dies, or takes three times as long by the clock, has no score.
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
        return _unless_unread(reasons)

    return EachReward(check, name="math")


def regex(
    pattern: str, full: bool = False, ignore_case: bool = False, timeout: float = 1.0
) -> Reward:
    """1.0 if ``pattern`` occurs in the reply (``full``: matches all of it). ``.`` matches line
    breaks too. A reply on which that takes more than ``timeout`` seconds has no score."""
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
    """1.0 if the reply is exactly ``<a>...</a>`` for the ``names`` in order, each tag once, with
    nothing but white space between: the format reward of DeepSeek-R1 (2501.12948)."""
    blocks = r"\s*".join(rf"<{re.escape(n)}>.*?</{re.escape(n)}>" for n in names)
    pattern = re.compile(rf"\s*{blocks}\s*", re.DOTALL)
    marks = [mark for n in names for mark in (f"<{n}>", f"</{n}>")]

    def check(conversation: Conversation) -> float:
        reply = last_reply(conversation)
        once = all(reply.count(mark) == 1 for mark in marks)
        return float(once and pattern.fullmatch(reply) is not None)

    return EachReward(check, name="format")


def length(low: int = 0, high: int | None = None, unit: str = "words") -> Reward:
    """0.0 for a reply of ``low`` to ``high`` words (or characters), below that minus the share of
    ``low`` that is missing, above it minus the share of ``high`` in excess, at worst -1."""
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
    """Minus the share of word ``n``-grams of the reply that occurred in it before: 0.0 to -1.0."""
    if n < 1:
        raise UserError(f"repetition: n must be >= 1, got {n}")

    def check(conversation: Conversation) -> float:
        words = last_reply(conversation).casefold().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    return EachReward(check, name="repetition")


def refusal() -> Reward:
    """1.0 if the reply's first 200 characters read like a refusal, else 0.0.

    A weak signal: on human preference pairs such an expression decides few and errs often; use it
    to watch for drift, or with a weight of your choice as a penalty.
    """

    def check(conversation: Conversation) -> float:
        opening = last_reply(conversation)[:200].casefold().replace("’", "'")
        return float(_REFUSAL.search(opening) is not None)

    return EachReward(check, name="refusal")
