"""Sentiment of the reply from a list of words: fast, transparent, easy to game."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from rlhf.errors import UserError
from rlhf.reward_models.core import Conversation, EachReward, Reward, last_reply

_WORD = re.compile(r"[a-z]+(?:[-'][a-z]+)*")
_NEGATIONS = frozenset(
    ("not", "no", "never", "none", "nothing", "nor", "without", "hardly", "barely", "cannot")
)
_STRONGER = frozenset(("very", "really", "extremely", "absolutely", "totally", "truly", "so"))
_WEAKER = frozenset(("slightly", "somewhat", "fairly", "rather", "almost", "kinda", "sorta"))
_REACH = 3  # words that a negation looks ahead
_SHRINK = 2.0  # pulls replies with little evidence towards 0


def lexicon(path: str | None = None) -> Reward:
    """Sentiment of the reply in (-1, 1): sum of word valences over sum of their sizes + 2.

    A negation among the three words before flips a word at three quarters of its strength; the
    word just before may strengthen or weaken it. ``path``: a file of your own, one "word value" per
    line. Repeating a good word saturates rather than grows, but such a score is still easily
    gamed: watch it beside a held-out judge.

    Raises:
        FileNotFoundError, UserError: no such file, or a line that is not "word value".
    """
    words = read_lexicon(path)
    return EachReward(lambda c: valence(last_reply(c), words), name="lexicon")


def valence(text: str, words: dict[str, float]) -> float:
    """Sentiment of ``text`` in (-1, 1); 0 without any known word."""
    tokens = _WORD.findall(text.casefold().replace("’", "'"))
    total = size = 0.0
    for i, token in enumerate(tokens):
        value = words.get(token, 0.0)
        if not value:
            continue
        before = tokens[i - 1] if i else ""
        value *= 1.5 if before in _STRONGER else 0.5 if before in _WEAKER else 1.0
        if any(t in _NEGATIONS or t.endswith("n't") for t in tokens[max(0, i - _REACH) : i]):
            value *= -0.75
        total += value
        size += abs(value)
    return total / (size + _SHRINK)


@cache
def read_lexicon(path: str | None = None) -> dict[str, float]:
    """Word -> valence from ``path``, or from the list that ships with this package."""
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
            raise UserError(f"{path}:{number} should be 'word value', got {line!r}") from None
    return words


def vader() -> Reward:
    """VADER's compound sentiment of the reply, -1 to 1 (Hutto and Gilbert 2014).

    Needs ``pip install "rlhf-kit[sentiment]"``. Made for short social-media text.
    """
    try:
        from vaderSentiment.vaderSentiment import (  # type: ignore[import-not-found]
            SentimentIntensityAnalyzer,
        )
    except ModuleNotFoundError as error:
        raise UserError('vader needs: pip install "rlhf-kit[sentiment]"') from error
    analyzer = SentimentIntensityAnalyzer()

    def check(conversation: Conversation) -> float:
        return analyzer.polarity_scores(last_reply(conversation))["compound"]

    return EachReward(check, name="vader")
