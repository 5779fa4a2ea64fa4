"""Split replies into words, and sum the attributions of the tokens of each word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhf.common.conversation import Conversation
from rlhf.explain.encoding import EncodedConversation
from rlhf.reward_models.core import content_text

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Word:
    """A word of the last message of a reply."""

    side: str
    """Text that contains the word: chosen, rejected or text."""
    start: int
    """Position of the first character in the content of the message."""
    end: int
    """Position after the last character."""
    text: str
    """The word."""


def words_of_last_message(conversation: Conversation, side: str) -> list[Word]:
    """Return the words of the last message, which are sequences without white space."""
    content = content_text(conversation[-1].get("content"))
    return [Word(side, m.start(), m.end(), m.group()) for m in _WORD.finditer(content)]


def without_words(conversation: Conversation, words: Iterable[Word]) -> Conversation:
    """Return the conversation without the given words of its last message.

    The white space before a removed word and at the start of the message is also removed.
    """
    content = content_text(conversation[-1].get("content"))
    for word in sorted(words, key=lambda w: -w.start):
        content = content[: word.start].rstrip() + content[word.end :]
    return [*conversation[:-1], {**conversation[-1], "content": content.lstrip()}]


def word_attributions(
    words: Sequence[Word],
    conversation: Conversation,
    encoded: EncodedConversation,
    values: Sequence[float],
) -> list[float]:
    """Return the sum of the attributions of the tokens of each word.

    A token belongs to the word that contains its last character. Words that were truncated have the
    attribution 0.

    Args:
        words: Words of the last message of the conversation.
        conversation: The conversation.
        encoded: Tokens of the conversation.
        values: Attribution to each token, [T].
    """
    content = content_text(conversation[-1].get("content"))
    start = len(content) - len(content.lstrip())
    ends = [
        (start + end, value)
        for end, value in zip(encoded.ends, values, strict=True)
        if end is not None
    ]
    return [sum(value for last, value in ends if word.start < last <= word.end) for word in words]
