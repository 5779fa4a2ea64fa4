"""TF-IDF vectors of texts, for the bags of words that a reward model is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def fit_words(texts: Sequence[str], **options: Any) -> Any:
    """A fitted ``TfidfVectorizer``, or None where the texts have no word to tell them apart by.

    Words are runs of two or more letters or digits. Texts without such words (one-character
    replies, emoji) are split at white space instead.

    Args:
        texts: of the training rows.
        options: of ``TfidfVectorizer``.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    patterns = [options.pop("token_pattern", r"(?u)\b\w\w+\b"), r"\S+"]
    for pattern in patterns:
        words = TfidfVectorizer(sublinear_tf=True, token_pattern=pattern, **options)
        try:
            return words.fit(texts)
        except ValueError as error:  # scikit-learn has no class of its own for it
            if "empty vocabulary" not in str(error) and "no terms remain" not in str(error):
                raise
    return None
