"""Metrics of predictions for labelled texts, those of baselines, and the paired gains."""

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
    """Return accuracy, macro-F1 and AUC of logits, and the paired gain over each baseline.

    The AUC is the mean over the classes of one class against the others.

    Args:
        logits: Logits of the classes. [N, C]
        labels: Numbers of the classes. [N]
        baselines: Name -> logits of a baseline. [N, C]
        groups: Independent unit of each row, such as its prompt; by default each row is one. [N]
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
    """Return correlations and RMSE of predictions [N], and the gain over each baseline."""
    measures = (
        Measure("pearson", pearson, "fisher"),
        Measure("spearman", spearman, "fisher"),
        Measure("rmse", rmse, "log"),
    )
    return _compare(measures, predictions, targets, baselines, groups)


@dataclass(frozen=True)
class Measure:
    """A metric of predictions, and the scale of its interval."""

    name: str
    of: Callable[[np.ndarray, np.ndarray], float]
    """(predictions [N, ...], labels [N]) -> value of the metric."""
    scale: Scale | Literal["share"]
    rows: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """For a share: (predictions, labels) -> outcome of each row [N]."""


def _compare(
    measures: Sequence[Measure],
    scores: np.ndarray,
    labels: np.ndarray,
    baselines: dict[str, np.ndarray],
    groups: Sequence[Hashable] | None,
) -> dict[str, Any]:
    units = range(len(labels)) if groups is None else groups
    labels_and_units = (labels, units)
    return {
        "rows": len(labels),
        "units": len(set(units)),
        "metrics": {m.name: _estimate(m, scores, *labels_and_units) for m in measures},
        "baselines": {
            name: {m.name: _estimate(m, other, *labels_and_units) for m in measures}
            for name, other in baselines.items()
        },
        "gains": {
            name: {m.name: _gain(m, scores, other, *labels_and_units) for m in measures}
            for name, other in baselines.items()
        },
    }


def _estimate(
    measure: Measure, scores: np.ndarray, labels: np.ndarray, units: Sequence[Hashable]
) -> Estimate:
    if measure.rows is not None:
        return plain(share_interval(measure.rows(scores, labels), list(units)))
    assert measure.scale != "share"
    interval = jackknife(
        lambda rows: measure.of(scores[rows], labels[rows]), list(units), scale=measure.scale
    )
    return plain(as_row(interval, len(labels)))


def _gain(
    measure: Measure,
    scores: np.ndarray,
    baseline_scores: np.ndarray,
    labels: np.ndarray,
    units: Sequence[Hashable],
) -> Estimate:
    if measure.rows is not None:
        gains = measure.rows(scores, labels) - measure.rows(baseline_scores, labels)
        return plain(gain_interval(gains, list(units)))
    interval = jackknife(
        lambda rows: (
            measure.of(scores[rows], labels[rows]) - measure.of(baseline_scores[rows], labels[rows])
        ),
        list(units),
    )
    return plain(as_row(interval, len(labels)))


def plain(row: dict[str, float]) -> Estimate:
    """Convert an interval to the keys of reports on labelled texts; unknown numbers are None."""
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
    """Return the accuracy of outcomes [N] in [0, 1], and the paired gain over each baseline."""
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
    """Return the mean of outcomes [N] in [0, 1], with its interval over groups [N]."""
    return plain(share_interval(outcomes, groups))


def hits(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return 1 for each row whose class has the highest score, else 0. [N, C] -> [N]"""
    return (scores.argmax(1) == labels).astype(float)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose class has the highest score; scores [N, C]."""
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
    """Return the AUC of each class against the others, averaged over the classes; scores [N, C].

    Rows are ranked by log-probability, because logits are not comparable between rows.
    """
    logprobs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    areas = []
    for k in range(scores.shape[1]):
        of_class = labels == k
        inside, outside = int(of_class.sum()), int((~of_class).sum())
        if inside and outside:
            mean_rank = ranks(logprobs[:, k])[of_class].mean()
            areas.append((mean_rank - (inside - 1) / 2) / outside)
    return float(np.mean(areas)) if areas else float("nan")


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean squared difference."""
    return float(np.sqrt(((a - b) ** 2).mean()))


def words_classifier(
    train: Sequence[str], labels: Sequence[int], test: Sequence[str], *, classes: int
) -> np.ndarray:
    """Return log-probabilities [N, C] of logistic regression on TF-IDF of words and bigrams."""
    from sklearn.linear_model import LogisticRegression

    train_vectors, test_vectors = _words(train, test)
    logprobs = np.full((len(test), classes), -np.inf)
    if len(set(labels)) == 1:  # logistic regression needs two classes
        logprobs[:, labels[0]] = 0.0
        return logprobs
    model = LogisticRegression(C=10.0, max_iter=1000).fit(train_vectors, labels)
    logprobs[:, model.classes_] = model.predict_log_proba(test_vectors)
    return logprobs


def words_rater(train: Sequence[str], ratings: Sequence[float], test: Sequence[str]) -> np.ndarray:
    """Return ratings [N] predicted by ridge regression on the same vectors."""
    from sklearn.linear_model import Ridge

    train_vectors, test_vectors = _words(train, test)
    return Ridge(alpha=1.0).fit(train_vectors, ratings).predict(test_vectors)


def _words(train: Sequence[str], test: Sequence[str]) -> tuple[Any, Any]:
    """TF-IDF vectors of both sets; one column of zeros if the training texts have no words."""
    words = fit_words(train, ngram_range=(1, 2), min_df=2 if len(train) > 50 else 1)
    if words is None:
        return np.zeros((len(train), 1)), np.zeros((len(test), 1))
    return words.transform(train), words.transform(test)
