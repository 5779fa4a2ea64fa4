"""Sentiment rewards from word lists, which are fast but easy for a policy to exploit."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from rlhf.common.imports import check_extra_installed
from rlhf.errors import UserError
from rlhf.reward_models.core import PerConversationReward, Reward, last_reply

_WORD = re.compile(r"[a-z]+(?:[-'][a-z]+)*")
_NEGATING_WORDS = frozenset(
    ("not", "no", "never", "none", "nothing", "nor", "without", "hardly", "barely", "cannot")
)
_STRENGTHENING_WORDS = frozenset(
    ("very", "really", "extremely", "absolutely", "totally", "truly", "so")
)
_WEAKENING_WORDS = frozenset(
    ("slightly", "somewhat", "fairly", "rather", "almost", "kinda", "sorta")
)
_NEGATION_RANGE = 3  # a negation affects this many words after it
_SHRINKAGE = 2.0  # added to the denominator, so that replies with few known words are near 0


def lexicon(path: str | None = None) -> Reward:
    """Build a reward that is the sentiment of the reply, in (-1, 1).

    The sentiment is the sum of the words' valences divided by (the sum of absolute valences + 2). A
    negation among the three words before a word multiplies the valence of the word by -0.75. If the
    previous word is an adverb such as "very" or "slightly", the valence is multiplied by 1.5 or
    0.5. Repeating a positive word raises the score less and less, but a policy can still exploit
    the reward. Use the score of a held-out judge to monitor training.

    Args:
        path: File with lines of the form "word value"; by default the lexicon of this package.

    Raises:
        FileNotFoundError: The file does not exist.
        UserError: A line does not have the form "word value".
    """
    words = read_lexicon(path)
    return PerConversationReward(lambda c: sentiment_score(last_reply(c), words), name="lexicon")


def sentiment_score(text: str, valences: dict[str, float]) -> float:
    """Return the sentiment of ``text`` in (-1, 1); 0.0 if no word is in ``valences``.

    ``valences`` maps words to their valences; see :func:`lexicon` for the formula.
    """
    tokens = _WORD.findall(text.casefold().replace("’", "'"))
    total = size = 0.0
    for i, token in enumerate(tokens):
        value = valences.get(token, 0.0)
        if not value:
            continue
        before = tokens[i - 1] if i else ""
        value *= (
            1.5 if before in _STRENGTHENING_WORDS else 0.5 if before in _WEAKENING_WORDS else 1.0
        )
        window = tokens[max(0, i - _NEGATION_RANGE) : i]
        if any(t in _NEGATING_WORDS or t.endswith("n't") for t in window):
            value *= -0.75
        total += value
        size += abs(value)
    return total / (size + _SHRINKAGE)


@cache
def read_lexicon(path: str | None = None) -> dict[str, float]:
    """Return word -> valence, from ``path`` or from the lexicon of this package.

    The result is cached and must not be changed. :func:`lexicon` describes the errors.
    """
    source = Path(path) if path else files("rlhf.reward_models") / "lexicon.txt"
    if not source.is_file():
        raise FileNotFoundError(f"no lexicon at {path}")
    words: dict[str, float] = {}
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        word, _, value = line.rpartition(" ")
        try:
            words[word.strip().casefold()] = float(value)
        except ValueError:
            raise UserError(
                f"{path}:{number} must have the form 'word value', got {line!r}"
            ) from None
    return words


def vader() -> Reward:
    """Build a reward that is VADER's compound sentiment, in [-1, 1] (Hutto and Gilbert 2014).

    VADER is made for short texts. This kind needs ``pip install "rlhf-kit[sentiment]"``.
    """
    check_extra_installed("the reward kind vader", "sentiment", "vaderSentiment")
    from vaderSentiment.vaderSentiment import (  # type: ignore[import-not-found]
        SentimentIntensityAnalyzer,
    )

    analyzer = SentimentIntensityAnalyzer()
    return PerConversationReward(
        lambda c: analyzer.polarity_scores(last_reply(c))["compound"], name="vader"
    )
