"""Rule-based rewards of the last reply: answers, patterns, formats, length, repetition.

Each function builds a :class:`~rlhf.reward_models.core.Reward`. Its arguments are the settings of
the corresponding kind in a configuration (``tags`` is the kind ``format``). For ``answer`` and
``answers`` see :class:`~rlhf.reward_models.targets.ReferenceAnswerSource`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction

import regex as timed  # re has no timeout, so a reply could block it forever

from rlhf.common.fences import without_reasoning
from rlhf.errors import UserError
from rlhf.reward_models.core import (
    Conversation,
    PerConversationReward,
    Reward,
    Unscorable,
    last_reply,
)
from rlhf.reward_models.notation import quantity
from rlhf.reward_models.notation.lexer import NotUnderstood
from rlhf.reward_models.targets import Answer, ReferenceAnswerSource
from rlhf.reward_models.worker import FunctionWorker

_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am)? (?:am )?(?:sorry|afraid)\b|i (?:can(?:'|no)t|won't|will not|must decline|"
    r"am (?:not able|unable)|refuse)\b|i'm (?:not able|unable|not comfortable|not going)\b|"
    r"as an ai\b|(?:can|could)(?:'|no)t (?:help|assist|comply|provide|fulfil)|"
    r"not (?:able|willing) to (?:help|assist|provide))"
)


def exact_match(
    answer: Answer | None = None, answers: str | None = None, ignore_case: bool = True
) -> Reward:
    """Build a reward of 1.0 if the reply equals a reference answer, else 0.0.

    Surrounding white space is ignored, and so is reasoning in ``<think>`` before the answer. If
    ``ignore_case`` is set, case is also ignored.
    """
    target = ReferenceAnswerSource(answer, answers)

    def score_last_reply(conversation: Conversation) -> float:
        reply = last_reply(conversation)
        whole, answer, *right = (
            text.strip().casefold() if ignore_case else text.strip()
            for text in (reply, without_reasoning(reply), *target.reference_answers(conversation))
        )
        return float(whole in right or answer in right)

    return PerConversationReward(score_last_reply, name="exact_match", outcomes=(0.0, 1.0))


def number(
    answer: Answer | None = None, answers: str | None = None, tolerance: float = 0.0
) -> Reward:
    """Build a reward of 1.0 if the final number of the reply equals a reference answer, else 0.0.

    The number may differ from the reference by at most ``tolerance``. A reply that cannot be parsed
    scores 0.0. If a reference cannot be parsed as one number, and the reply equals no other
    reference, there is no score. ``docs/rewards.md`` describes the notation.

    Raises:
        UserError: ``tolerance`` is negative or not finite.
    """
    if not 0 <= tolerance < float("inf"):
        raise UserError(f"number: tolerance must be >= 0 and finite, got {tolerance}")
    target, margin = ReferenceAnswerSource(answer, answers), Fraction(str(tolerance))

    def score_last_reply(conversation: Conversation) -> float:
        references, reply = target.reference_answers(conversation), last_reply(conversation)
        right, reasons = [], []
        for reference in references:
            try:
                right.append(quantity.parse_reference_quantity(reference))
            except NotUnderstood as reason:
                reasons.append(str(reason))
        value = None
        with suppress(NotUnderstood):
            value = quantity.parse_final_quantity(reply) if right else None
        if value is not None and any(r.matches(value, tolerance=margin) for r in right):
            return 1.0
        return _zero_or_raise_unscorable(reasons)

    return PerConversationReward(score_last_reply, name="number", outcomes=(0.0, 1.0))


def _zero_or_raise_unscorable(reasons: Sequence[str]) -> float:
    """Return 0.0, or raise Unscorable if a reference could not be parsed.

    A reference that could not be parsed may equal the reply, so the reply is not known to be wrong.
    ``reasons`` are the reasons why references could not be parsed.
    """
    if reasons:
        raise Unscorable(f"the reference answer cannot be parsed: {reasons[0]}")
    return 0.0


def math(answer: Answer | None = None, answers: str | None = None, timeout: float = 10.0) -> Reward:
    """Build a reward of 1.0 if the final expression of the reply equals a reference, else 0.0.

    The reply and the reference (LaTeX or plain text) are parsed by a grammar and compared by sympy
    in a separate process; see ``docs/rewards.md``. A reply that cannot be parsed, or needs more
    than ``timeout`` seconds of CPU time, scores 0.0. If a reference cannot be parsed, and the reply
    equals no other reference, there is no score. There is also no score if the process crashes or
    needs more than 3 * ``timeout`` seconds of wall-clock time.
    """
    target = ReferenceAnswerSource(answer, answers)
    worker = FunctionWorker(
        "rlhf.reward_models.math_check:answer_verdict_and_reason", timeout=3.0 * timeout
    )

    def score_last_reply(conversation: Conversation) -> float:
        reply, reasons = last_reply(conversation), []
        for reference in target.reference_answers(conversation):
            verdict, reason = worker(reference, reply, timeout)
            if verdict == "right":
                return 1.0
            if verdict == "reference":
                reasons.append(reason)
        return _zero_or_raise_unscorable(reasons)

    return PerConversationReward(score_last_reply, name="math", outcomes=(0.0, 1.0), waits=True)


def regex(
    pattern: str, full: bool = False, ignore_case: bool = False, timeout: float = 1.0
) -> Reward:
    """Build a reward of 1.0 if ``pattern`` occurs in the reply, else 0.0.

    With ``full``, the pattern must match the whole reply. ``.`` also matches line breaks. A reply
    for which the search takes more than ``timeout`` seconds has no score.

    Raises:
        UserError: ``pattern`` is not a regular expression, or ``timeout`` is not positive.
    """
    if not timeout > 0:
        raise UserError(f"regex: timeout must be > 0 seconds, got {timeout}")
    flags = timed.DOTALL | (timed.IGNORECASE if ignore_case else 0)
    try:
        compiled = timed.compile(pattern, flags)
    except timed.error as error:
        raise UserError(f"regex: {pattern!r} is not a regular expression ({error})") from error
    matches = compiled.fullmatch if full else compiled.search

    def score_last_reply(conversation: Conversation) -> float:
        try:
            return float(matches(last_reply(conversation), timeout=timeout) is not None)
        except TimeoutError:
            raise Unscorable(f"the pattern search takes more than {timeout:g} s") from None

    return PerConversationReward(score_last_reply, name="regex", outcomes=(0.0, 1.0))


def tags(names: Sequence[str] = ("think", "answer")) -> Reward:
    """Build a reward of 1.0 if the reply consists of the blocks ``<name>...</name>``, else 0.0.

    There must be one block for each of the ``names``, in their order, with only white space between
    the blocks. This is the format reward of DeepSeek-R1 (2501.12948).
    """
    blocks = r"\s*".join(rf"<{re.escape(n)}>.*?</{re.escape(n)}>" for n in names)
    pattern = re.compile(rf"\s*{blocks}\s*", re.DOTALL)
    marks = [mark for n in names for mark in (f"<{n}>", f"</{n}>")]

    def score_last_reply(conversation: Conversation) -> float:
        reply = last_reply(conversation)
        once = all(reply.count(mark) == 1 for mark in marks)
        return float(once and pattern.fullmatch(reply) is not None)

    return PerConversationReward(score_last_reply, name="format", outcomes=(0.0, 1.0))


def length(low: int = 0, high: int | None = None, unit: str = "words") -> Reward:
    """Build a reward of 0.0 for replies of ``low`` to ``high`` words, and below 0.0 for others.

    A shorter reply scores length / low - 1. A longer reply scores the larger of 1 - length / high
    and -1. ``unit`` is "words" or "characters". Without ``high``, there is no upper limit.

    Raises:
        UserError: ``unit`` is unknown, 0 <= low <= high does not hold, or ``high`` is below 1.
    """
    if unit not in ("words", "characters"):
        raise UserError(f"length: unit must be 'words' or 'characters', got {unit!r}")
    if low < 0 or (high is not None and high < max(low, 1)):
        raise UserError(
            f"length: 0 <= low <= high and high >= 1 are required, got low={low}, high={high}"
        )

    def score_last_reply(conversation: Conversation) -> float:
        reply = last_reply(conversation)
        size = len(reply.split()) if unit == "words" else len(reply)
        if size < low:
            return size / low - 1.0
        return max(-1.0, 1.0 - size / high) if high is not None and size > high else 0.0

    return PerConversationReward(score_last_reply, name="length")


def repetition(n: int = 3) -> Reward:
    """Build a penalty of repetition: minus the fraction of word n-grams that repeat earlier ones.

    Case is ignored. The score is in (-1, 0]; it is 0 if the reply has fewer than n words.

    Raises:
        UserError: ``n`` is below 1.
    """
    if n < 1:
        raise UserError(f"repetition: n must be >= 1, got {n}")

    def score_last_reply(conversation: Conversation) -> float:
        words = last_reply(conversation).casefold().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    return PerConversationReward(score_last_reply, name="repetition")


def refusal() -> Reward:
    """Build a reward of 1.0 if the first 200 characters contain a typical refusal, else 0.0.

    The signal is weak, because few replies match the pattern, and a match is often not a refusal.
    Use the reward to monitor training, or as a penalty with a negative weight.
    """

    def score_last_reply(conversation: Conversation) -> float:
        opening = last_reply(conversation)[:200].casefold().replace("’", "'")
        return float(_REFUSAL.search(opening) is not None)

    return PerConversationReward(score_last_reply, name="refusal", outcomes=(0.0, 1.0))
