"""Find preference pairs whose label is probably wrong, with a model fitted on other pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.data.splits import fold_of_each_row
from rlhf.reward_models.words import fit_tfidf


@dataclass(frozen=True)
class CrossFittedMargins:
    """Cross-fitted margins of preference pairs."""

    margin: np.ndarray
    """Predicted log-odds of the label of each of N pairs; the model is fitted on pairs with other
    prompts."""

    @property
    def accuracy(self) -> float:
        """Fraction of pairs whose label the model predicts; a margin of 0 counts one half."""
        return float(np.mean((self.margin > 0) + 0.5 * (self.margin == 0)))

    def suspects(self, limit: int) -> list[int]:
        """Return the indices of up to `limit` pairs with negative margins, by ascending margin."""
        order = np.argsort(self.margin, kind="stable")[:limit]
        return [int(index) for index in order if self.margin[index] < 0]


def cross_fitted_margins(
    rows: Sequence[Mapping[str, Any]], *, num_folds: int = 5, seed: int, regularization: float = 1.0
) -> CrossFittedMargins:
    """Return the margins that logistic regressions on bags of words predict for held-out pairs.

    The features of a pair are the difference (chosen - rejected) of TF-IDF vectors over words and
    word pairs. The model has no intercept, so swapping the replies of a pair negates its margin.
    Folds have no common prompts. The margins of a fold are 0 if no word occurs in two replies of
    the other folds. A bag of words is a weak model, so check `accuracy` before using the margins.

    Args:
        rows: Preference rows.
        num_folds: Number of folds.
        seed: Seed of the folds.
        regularization: Inverse strength of the L2 penalty (scikit-learn's `C`).

    Raises:
        UserError: There are fewer distinct prompts than folds, or fewer than two folds.
    """
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    fold = np.asarray(fold_of_each_row(rows, num_folds, seed=seed))
    chosen, rejected = (
        ["\n".join(turn["content"] for turn in row[side]) for row in rows]
        for side in ("chosen", "rejected")
    )
    margin = np.zeros(len(rows))
    for k in range(num_folds):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        words = fit_tfidf(
            [side[i] for side in (chosen, rejected) for i in train],
            ngram_range=(1, 2),
            min_df=2,
            max_features=50_000,
            token_pattern=r"\S+",
        )
        if words is None:  # no word occurs twice, so there are no features
            continue
        gap = words.transform([chosen[i] for i in train]) - words.transform(
            [rejected[i] for i in train]
        )
        model = LogisticRegression(C=regularization, fit_intercept=False, max_iter=200)
        model.fit(sparse.vstack([gap, -gap]), np.repeat([1, 0], len(train)))
        margin[test] = model.decision_function(
            words.transform([chosen[i] for i in test])
            - words.transform([rejected[i] for i in test])
        )
    return CrossFittedMargins(margin)
