"""Baselines for rewards on pairs: length, a bag of words, and the reward without the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf.reward_models.core import Reward, last_reply
from rlhf.reward_models.pairs import Pair
from rlhf.reward_models.words import fit_tfidf
from rlhf.stats.units import distinct_clusters_and_index

# Inverse regularization strength; the best value for 2,000 to 20,000 pairs of two datasets.
_WORDS_C = 1e-4


def length_differences(pairs: Sequence[Pair]) -> np.ndarray:
    """Return the differences in length, chosen - rejected, in characters, [N]."""
    return np.array([a - b for a, b in (pair.lengths for pair in pairs)], dtype=float)


def bag_of_words_margins(
    pairs: Sequence[Pair], *, train: Sequence[Pair] | None = None, folds: int = 5, seed: int = 0
) -> np.ndarray:
    """Return the margins [N] of a logistic regression on the words of the two replies.

    The regression is fitted on ``train``. If ``train`` is None, it is cross-fitted on ``pairs`` in
    at most ``folds`` folds; pairs with the same prompt are in the same fold. The features are the
    differences of the two replies' TF-IDF vectors, so they do not depend on the prompt.

    Raises:
        ValueError: ``train`` is None and the pairs have fewer than two prompts.
    """
    if train is not None:
        return _fit_and_score_words(train, pairs)
    prompts, groups = distinct_clusters_and_index([pair.prompt_json for pair in pairs])
    if len(prompts) < 2:
        raise ValueError("a cross-fitted bag of words needs at least two prompts")
    parts = np.random.default_rng(seed).permutation(len(prompts)) % min(folds, len(prompts))
    margins = np.zeros(len(pairs))
    for part in range(parts.max() + 1):
        held_out = parts[groups] == part
        margins[held_out] = _fit_and_score_words(
            [p for p, out in zip(pairs, held_out, strict=True) if not out],
            [p for p, out in zip(pairs, held_out, strict=True) if out],
        )
    return margins


def _fit_and_score_words(train: Sequence[Pair], test: Sequence[Pair]) -> np.ndarray:
    """Fit the regression on ``train`` and return the margins of ``test``, [N].

    The margins are 0 if ``train`` has fewer than two pairs or no words.
    """
    from sklearn.linear_model import LogisticRegression

    def replies(pairs: Sequence[Pair], side: str) -> list[str]:
        return [
            "\n".join(m["content"] for m in getattr(pair, side)[len(pair.prompt) :])
            for pair in pairs
        ]

    texts = replies(train, "chosen") + replies(train, "rejected")
    words = fit_tfidf(texts, norm=None, min_df=2 if len(train) > 50 else 1)
    if words is None or len(train) < 2:
        return np.zeros(len(test))
    x, z = (
        words.transform(replies(pairs, "chosen")) - words.transform(replies(pairs, "rejected"))
        for pairs in (train, test)
    )
    half = np.arange(x.shape[0]) % 2 == 0
    signs = np.where(half, 1.0, -1.0)
    model = LogisticRegression(C=_WORDS_C, fit_intercept=False, max_iter=1000)
    model.fit(x.multiply(signs[:, None]).tocsr(), half)
    return np.asarray(model.decision_function(z))


def response_only_margins(reward: Reward, pairs: Sequence[Pair]) -> np.ndarray:
    """Return the margins [N] of ``reward`` on the last replies without their prompts.

    A margin is nan if a reply could not be scored.
    """

    def reply_without_prompt(pair: Pair, side: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": last_reply(getattr(pair, side))}]

    values = reward(
        [reply_without_prompt(p, "chosen") for p in pairs]
        + [reply_without_prompt(p, "rejected") for p in pairs]
    )
    scores = np.array(values, dtype=float)
    return scores[: len(pairs)] - scores[len(pairs) :]
