"""How good a classifier or rater is on labelled texts, beside a bag of words, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf.reward_models.report.intervals import (
    as_row,
    gain_interval,
    pearson,
    ranks,
    share_interval,
    spearman,
)
from rlhf.reward_models.words import fit_words
from rlhf.stats import jackknife
from rlhf.stats.jackknife import Scale

Estimate = dict[str, float | None]


def classification_report(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    baselines: dict[str, np.ndarray],
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Accuracy, macro-F1 and AUC of class scores [N, C], and the paired gain over each baseline's.

    Gains compare the same rows. AUC is the mean over the classes of one against the rest.

    Args:
        logits: [N, C].
        labels: [N] classes.
        baselines: name -> [N, C].
        groups: [N] the independent unit of each row, such as its prompt; by default every row.
    """
    measures = (
        Measure("accuracy", accuracy, "share", hits),
        Measure("macro_f1", macro_f1, "logit"),
        Measure("auc", auc, "logit"),
    )
    return _compare(measures, logits, labels, baselines, groups)


def rating_report(
    predictions: np.ndarray,
    targets: np.ndarray,
    *,
    baselines: dict[str, np.ndarray],
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Correlations and RMSE of predictions [N], and the paired gain over each baseline."""
    measures = (
        Measure("pearson", pearson, "fisher"),
        Measure("spearman", spearman, "fisher"),
        Measure("rmse", rmse, "log"),
    )
    return _compare(measures, predictions, targets, baselines, groups)


@dataclass(frozen=True)
class Measure:
    """A number that says how good predictions are, and how its interval is made."""

    name: str
    of: Callable[[np.ndarray, np.ndarray], float]
    """(predictions [N, ...], labels [N]) -> the number."""
    scale: Scale | Literal["share"]
    rows: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """For a share: the outcome of each row [N]."""


def _compare(
    measures: Sequence[Measure],
    scores: np.ndarray,
    labels: np.ndarray,
    baselines: dict[str, np.ndarray],
    groups: Sequence[Hashable] | None,
) -> dict[str, Any]:
    units = range(len(labels)) if groups is None else groups
    everything = (labels, units)
    return {
        "rows": len(labels),
        "units": len(set(units)),
        "metrics": {m.name: _estimate(m, scores, *everything) for m in measures},
        "baselines": {
            name: {m.name: _estimate(m, theirs, *everything) for m in measures}
            for name, theirs in baselines.items()
        },
        "gains": {
            name: {m.name: _gain(m, scores, theirs, *everything) for m in measures}
            for name, theirs in baselines.items()
        },
    }


def _estimate(
    measure: Measure, scores: np.ndarray, labels: np.ndarray, units: Sequence[Hashable]
) -> Estimate:
    if measure.rows is not None:
        return plain(share_interval(measure.rows(scores, labels), list(units)))
    assert measure.scale != "share"
    found = jackknife(
        lambda rows: measure.of(scores[rows], labels[rows]), list(units), scale=measure.scale
    )
    return plain(as_row(found, len(labels)))


def _gain(
    measure: Measure,
    scores: np.ndarray,
    theirs: np.ndarray,
    labels: np.ndarray,
    units: Sequence[Hashable],
) -> Estimate:
    if measure.rows is not None:
        gains = measure.rows(scores, labels) - measure.rows(theirs, labels)
        return plain(gain_interval(gains, list(units)))
    found = jackknife(
        lambda rows: (
            measure.of(scores[rows], labels[rows]) - measure.of(theirs[rows], labels[rows])
        ),
        list(units),
    )
    return plain(as_row(found, len(labels)))


def plain(row: dict[str, float]) -> Estimate:
    """An interval in the words of reports on labelled texts; unknown ends are None."""
    known = math.isfinite(row["low"])
    return {
        "mean": row["value"] if math.isfinite(row["value"]) else None,
        "low": row["low"] if known else None,
        "high": row["high"] if known else None,
        "n": int(row["groups"]),
    }


def accuracy_report(
    correct: Sequence[float] | np.ndarray,
    *,
    baselines: Mapping[str, Sequence[float] | np.ndarray],
    groups: Sequence[Hashable],
) -> dict[str, Any]:
    """Accuracy of outcomes [N] in [0, 1], that of each baseline, and the paired gain over it."""
    return {
        "rows": len(correct),
        "units": len(set(groups)),
        "metrics": {"accuracy": share(correct, groups)},
        "baselines": {
            name: {"accuracy": share(outcomes, groups)} for name, outcomes in baselines.items()
        },
        "gains": {
            name: {"accuracy": plain(gain_interval(np.subtract(correct, outcomes), groups))}
            for name, outcomes in baselines.items()
        },
    }


def share(outcomes: Sequence[float] | np.ndarray, groups: Sequence[Hashable]) -> Estimate:
    """Mean of outcomes [N] in [0, 1], with its interval over groups [N]."""
    return plain(share_interval(outcomes, groups))


def hits(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[N] 1 where the class of a row scores highest, else 0; scores [N, C]."""
    return (scores.argmax(1) == labels).astype(float)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of the rows whose class scores highest; scores [N, C]."""
    return float(hits(scores, labels).mean())


def macro_f1(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the harmonic mean of precision and recall."""
    # Not scikit-learn's f1_score: a jackknife calls this 100 times, and that is far slower.
    classes = scores.shape[1]
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels, scores.argmax(1)), 1)
    totals = confusion.sum(0) + confusion.sum(1)
    return float((2 * confusion.diagonal() / np.maximum(totals, 1)).mean())


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """P(a row of a class is given more of it than a row of another), mean over classes.

    Ranked by log-probability: logits of one class compare between rows only once normalised.
    """
    shares = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    found = []
    for k in range(scores.shape[1]):
        of_class = labels == k
        inside, outside = int(of_class.sum()), int((~of_class).sum())
        if inside and outside:
            mean_rank = ranks(shares[:, k])[of_class].mean()
            found.append((mean_rank - (inside - 1) / 2) / outside)
    return float(np.mean(found)) if found else float("nan")


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    """Root of the mean squared difference."""
    return float(np.sqrt(((a - b) ** 2).mean()))


def words_classifier(
    train: Sequence[str], labels: Sequence[int], test: Sequence[str], *, classes: int
) -> np.ndarray:
    """Log-probabilities [N, C] of logistic regression on TF-IDF of one and two words."""
    from sklearn.linear_model import LogisticRegression

    vectors, theirs = _words(train, test)
    found = np.full((len(test), classes), -np.inf)
    if len(set(labels)) == 1:  # nothing to tell apart
        found[:, labels[0]] = 0.0
        return found
    model = LogisticRegression(C=10.0, max_iter=1000).fit(vectors, labels)
    found[:, model.classes_] = model.predict_log_proba(theirs)
    return found


def words_rater(train: Sequence[str], ratings: Sequence[float], test: Sequence[str]) -> np.ndarray:
    """Ratings [N] that ridge regression on the same vectors predicts."""
    from sklearn.linear_model import Ridge

    vectors, theirs = _words(train, test)
    return Ridge(alpha=1.0).fit(vectors, ratings).predict(theirs)


def _words(train: Sequence[str], test: Sequence[str]) -> tuple[Any, Any]:
    """Vectors of one and two words; a single column of zeros where the texts have no words."""
    words = fit_words(train, ngram_range=(1, 2), min_df=2 if len(train) > 50 else 1)
    if words is None:
        return np.zeros((len(train), 1)), np.zeros((len(test), 1))
    return words.transform(train), words.transform(test)
