"""Find pairs whose label is probably wrong: those that a model of the others contradicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.data.splits import fold_indices
from rlhf.reward_models.words import fit_words


@dataclass(frozen=True)
class Margins:
    """Cross-fitted margins of preference pairs."""

    margin: np.ndarray
    """[N] log-odds of the given label, from a model that saw no pair with this prompt."""

    @property
    def accuracy(self) -> float:
        """Share of pairs whose label the model predicts; a tie counts one half."""
        return float(np.mean((self.margin > 0) + 0.5 * (self.margin == 0)))

    def suspects(self, limit: int) -> list[int]:
        """Indices of contradicted pairs (margin below 0), the most contradicted first."""
        order = np.argsort(self.margin, kind="stable")[:limit]
        return [int(index) for index in order if self.margin[index] < 0]


def cross_fitted_margins(
    rows: Sequence[Mapping[str, Any]], *, num_folds: int = 5, seed: int, regularisation: float = 1.0
) -> Margins:
    """Margins from logistic regressions on words of chosen minus words of rejected.

    Features are the differences of tf-idf vectors over words and word pairs, and the model has no
    intercept, so that swapping a pair negates its margin. Folds never share a prompt. A bag of
    words is a weak judge: read the accuracy before the list.
    """
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    fold = np.asarray(fold_indices(rows, num_folds, seed=seed))
    chosen, rejected = ([_text(row[side]) for row in rows] for side in ("chosen", "rejected"))
    margin = np.zeros(len(rows))
    for held in range(num_folds):
        train, test = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
        words = fit_words(
            [side[i] for side in (chosen, rejected) for i in train],
            ngram_range=(1, 2),
            min_df=2,
            max_features=50_000,
            token_pattern=r"\S+",
        )
        if words is None:  # no word occurs twice: nothing speaks for or against a label
            continue
        gap = words.transform([chosen[i] for i in train]) - words.transform(
            [rejected[i] for i in train]
        )
        model = LogisticRegression(C=regularisation, fit_intercept=False, max_iter=200)
        model.fit(sparse.vstack([gap, -gap]), np.repeat([1, 0], len(train)))
        margin[test] = model.decision_function(
            words.transform([chosen[i] for i in test])
            - words.transform([rejected[i] for i in test])
        )
    return Margins(margin)


def _text(reply: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(turn["content"] for turn in reply)
