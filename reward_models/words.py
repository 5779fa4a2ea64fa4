"""TF-IDF vectors of texts, for bag-of-words baselines of reward models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def fit_tfidf(texts: Sequence[str], **options: Any) -> Any:
    """Fit a ``TfidfVectorizer`` to texts and return it, or None if the vocabulary is empty.

    Words are sequences of at least two letters or digits. If the texts contain no such word, but
    for example only single characters or emoji, the words are the parts between white space.

    Args:
        texts: Training texts.
        **options: Further options of ``TfidfVectorizer``; ``token_pattern`` replaces the first
            pattern of a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    patterns = [options.pop("token_pattern", r"(?u)\b\w\w+\b"), r"\S+"]
    for pattern in patterns:
        words = TfidfVectorizer(sublinear_tf=True, token_pattern=pattern, **options)
        try:
            return words.fit(texts)
        except ValueError as error:  # scikit-learn has no specific exception for it
            if "empty vocabulary" not in str(error) and "no terms remain" not in str(error):
                raise
    return None
