"""Sentiment rewards from word lists, which are fast but easy for a policy to exploit."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from rlhf.errors import UserError
from rlhf.reward_models.core import EachReward, Reward, last_reply

_WORD = re.compile(r"[a-z]+(?:[-'][a-z]+)*")
_NEGATIONS = frozenset(
    ("not", "no", "never", "none", "nothing", "nor", "without", "hardly", "barely", "cannot")
)
_STRONGER = frozenset(("very", "really", "extremely", "absolutely", "totally", "truly", "so"))
_WEAKER = frozenset(("slightly", "somewhat", "fairly", "rather", "almost", "kinda", "sorta"))
_NEGATION_RANGE = 3  # number of words after a negation that it affects
_SHRINKAGE = 2.0  # shrinks the sentiment of replies with few known words towards 0


def lexicon(path: str | None = None) -> Reward:
    """Reward the sentiment in (-1, 1): sum of valences / (sum of absolute valences + 2).

    A negation among the three words before a word multiplies its valence by -0.75; an adverb of
    degree just before it changes its strength. Repeating a positive word saturates, but a policy
    can still exploit the score; monitor it together with a held-out judge.

    Args:
        path: File with a "word value" per line; by default the lexicon of this package.

    Raises:
        FileNotFoundError: The file does not exist.
        UserError: A line is not "word value".
    """
    words = read_lexicon(path)
    return EachReward(lambda c: valence(last_reply(c), words), name="lexicon")


def valence(text: str, words: dict[str, float]) -> float:
    """Return the sentiment of ``text`` in (-1, 1); 0 without known words."""
    tokens = _WORD.findall(text.casefold().replace("’", "'"))
    total = size = 0.0
    for i, token in enumerate(tokens):
        value = words.get(token, 0.0)
        if not value:
            continue
        before = tokens[i - 1] if i else ""
        value *= 1.5 if before in _STRONGER else 0.5 if before in _WEAKER else 1.0
        window = tokens[max(0, i - _NEGATION_RANGE) : i]
        if any(t in _NEGATIONS or t.endswith("n't") for t in window):
            value *= -0.75
        total += value
        size += abs(value)
    return total / (size + _SHRINKAGE)


@cache
def read_lexicon(path: str | None = None) -> dict[str, float]:
    """Return word -> valence, from ``path`` or from the lexicon of this package."""
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
    """Reward VADER's compound sentiment in [-1, 1], for short texts (Hutto and Gilbert 2014).

    Needs ``pip install "rlhf-kit[sentiment]"``.
    """
    try:
        from vaderSentiment.vaderSentiment import (  # type: ignore[import-not-found]
            SentimentIntensityAnalyzer,
        )
    except ModuleNotFoundError as error:
        raise UserError('vader needs: pip install "rlhf-kit[sentiment]"') from error
    analyzer = SentimentIntensityAnalyzer()
    return EachReward(lambda c: analyzer.polarity_scores(last_reply(c))["compound"], name="vader")
