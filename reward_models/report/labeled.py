"""Compute metrics of a model and of baselines on labeled texts, and the model's paired gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import rankdata

from rlhf.reward_models.report.intervals import (
    interval_as_dict,
    paired_difference_interval,
    pearson,
    proportion_interval,
    spearman,
)
from rlhf.reward_models.words import fit_tfidf
from rlhf.stats import jackknife
from rlhf.stats.jackknife import Scale

Estimate = dict[str, float | None]


@dataclass(frozen=True)
class Measure:
    """A metric of predictions [N, ...] and labels [N]."""

    metric: Callable[[np.ndarray, np.ndarray], Any]
    """Function that returns the metric of predictions and labels. With the scale "share", it
    returns the outcome of each row, [N], and the metric is the mean of the outcomes."""
    scale: Scale | Literal["share"]
    """Scale on which the interval is computed; "share" is for means of outcomes in [0, 1]."""

    def estimate(
        self, predictions: np.ndarray, labels: np.ndarray, units: Sequence[Hashable]
    ) -> Estimate:
        """Return the metric with its interval; ``units`` [N] are the rows' independent units."""
        if self.scale == "share":
            return proportion_estimate(self.metric(predictions, labels), units)

        def metric_on_rows(rows: np.ndarray) -> float:
            return self.metric(predictions[rows], labels[rows])

        return as_estimate(
            interval_as_dict(jackknife(metric_on_rows, units, scale=self.scale), len(labels))
        )

    def gain(
        self,
        predictions: np.ndarray,
        baseline: np.ndarray,
        labels: np.ndarray,
        units: Sequence[Hashable],
    ) -> Estimate:
        """Return the model's metric minus the baseline's, with its paired interval over units.

        ``units`` [N] are the independent units of the rows.
        """

        def metric_difference(rows: Any = slice(None)) -> Any:
            score = self.metric(predictions[rows], labels[rows])
            return score - self.metric(baseline[rows], labels[rows])

        if self.scale == "share":
            return as_estimate(paired_difference_interval(metric_difference(), units))
        return as_estimate(interval_as_dict(jackknife(metric_difference, units), len(labels)))


def labeled_report(
    measures: Mapping[str, Measure],
    predictions: np.ndarray,
    labels: np.ndarray,
    *,
    baselines: Mapping[str, np.ndarray],
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Return the metrics of a model and of baselines, and the paired gain over each baseline.

    Args:
        measures: ``CLASS_MEASURES`` for logits [N, C], ``RATING_MEASURES`` for ratings [N].
        predictions: Predictions of the model, [N, ...].
        labels: Class indices or ratings, [N].
        baselines: Name -> predictions of the baseline, [N, ...].
        groups: Independent unit of each row, such as its prompt, [N]; by default, each row is a
            unit.

    Returns:
        A dictionary with ``rows`` and ``units`` (their numbers), ``metrics`` (metric -> estimate of
        the model), ``baselines`` and ``gains`` (baseline -> metric -> estimate).
    """
    units = list(range(len(labels)) if groups is None else groups)

    def estimate_by_measure(model_predictions: np.ndarray) -> dict[str, Estimate]:
        return {name: m.estimate(model_predictions, labels, units) for name, m in measures.items()}

    def gains(baseline_predictions: np.ndarray) -> dict[str, Estimate]:
        return {
            name: m.gain(predictions, baseline_predictions, labels, units)
            for name, m in measures.items()
        }

    return {
        "rows": len(labels),
        "units": len(set(units)),
        "metrics": estimate_by_measure(predictions),
        "baselines": {name: estimate_by_measure(column) for name, column in baselines.items()},
        "gains": {name: gains(column) for name, column in baselines.items()},
    }


def accuracy_report(
    correct: Sequence[float] | np.ndarray,
    *,
    baselines: Mapping[str, Sequence[float] | np.ndarray],
    groups: Sequence[Hashable],
) -> dict[str, Any]:
    """Return the `labeled_report` of the accuracy alone.

    Args:
        correct: Outcomes of the model in [0, 1], [N].
        baselines: Name -> outcomes of the baseline in [0, 1], [N].
        groups: Independent unit of each row, [N].
    """
    measures = {"accuracy": Measure(lambda outcomes, _: outcomes, "share")}
    outcomes = {name: np.asarray(column) for name, column in baselines.items()}
    no_labels = np.zeros(len(correct))
    return labeled_report(
        measures, np.asarray(correct), no_labels, baselines=outcomes, groups=groups
    )


def as_estimate(interval: dict[str, float]) -> Estimate:
    """Convert a result of `clustered_mean_interval` to a dictionary for the report.

    Its keys are ``mean``, ``low``, ``high`` and ``n`` (number of groups). Unknown values are None.
    """
    known = math.isfinite(interval["low"])
    return {
        "mean": interval["value"] if math.isfinite(interval["value"]) else None,
        "low": interval["low"] if known else None,
        "high": interval["high"] if known else None,
        "n": int(interval["groups"]),
    }


def proportion_estimate(
    outcomes: Sequence[float] | np.ndarray, groups: Sequence[Hashable]
) -> Estimate:
    """Return the mean of outcomes in [0, 1], [N], with its interval over ``groups`` [N]."""
    return as_estimate(proportion_interval(outcomes, groups))


def correctness_indicators(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return 1.0 for each row whose label has the highest score, else 0.0, [N].

    ``scores`` are [N, C], and ``labels`` [N] are class indices.
    """
    return (scores.argmax(1) == labels).astype(float)


def macro_f1(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the F1 score, averaged over the classes that occur.

    A class occurs if a row has it as its label or as its prediction. Other classes have no F1
    score; with a score of 0, right predictions of all rows would have an average below 1.
    ``scores`` are [N, C], and ``labels`` [N] are class indices.
    """
    # scikit-learn's f1_score is too slow for a jackknife, which makes up to 101 calls.
    classes = scores.shape[1]
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels, scores.argmax(1)), 1)
    totals = confusion.sum(0) + confusion.sum(1)
    occurs = totals > 0
    return float((2 * confusion.diagonal()[occurs] / totals[occurs]).mean())


def macro_auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the AUC of each class against the others, averaged over the classes that occur.

    Rows are ranked by the log-probability of the class, because logits are not comparable between
    rows. The result is nan if all labels are equal.

    Args:
        logits: Logits, [N, C].
        labels: Class indices, [N].
    """
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    areas = []
    for k in range(logits.shape[1]):
        of_class = labels == k
        inside, outside = int(of_class.sum()), int((~of_class).sum())
        if inside and outside:
            mean_rank = rankdata(logprobs[:, k])[of_class].mean()
            areas.append((mean_rank - (inside + 1) / 2) / outside)
    return float(np.mean(areas)) if areas else float("nan")


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    """Return the root mean squared difference of two vectors."""
    return float(np.sqrt(((a - b) ** 2).mean()))


CLASS_MEASURES = {
    "accuracy": Measure(correctness_indicators, "share"),
    "macro_f1": Measure(macro_f1, "logit"),
    "auc": Measure(macro_auc, "logit"),
}
RATING_MEASURES = {
    "pearson": Measure(pearson, "fisher"),
    "spearman": Measure(spearman, "fisher"),
    "rmse": Measure(rmse, "log"),
}


def class_logprobs_from_words(
    train: Sequence[str], labels: Sequence[int], test: Sequence[str], *, num_classes: int
) -> np.ndarray:
    """Fit a logistic regression on TF-IDF vectors of words and bigrams; predict ``test``.

    Returns:
        Log-probabilities of the classes for each test text, [N, C]; -inf for classes that do not
        occur in ``labels``.
    """
    from sklearn.linear_model import LogisticRegression

    train_vectors, test_vectors = _tfidf_vectors(train, test)
    logprobs = np.full((len(test), num_classes), -np.inf)
    if len(set(labels)) == 1:  # logistic regression needs two classes
        logprobs[:, labels[0]] = 0.0
        return logprobs
    model = LogisticRegression(C=10.0, max_iter=1000).fit(train_vectors, labels)
    logprobs[:, model.classes_] = model.predict_log_proba(test_vectors)
    return logprobs


def predict_ratings_from_words(
    train: Sequence[str], ratings: Sequence[float], test: Sequence[str]
) -> np.ndarray:
    """Fit a ridge regression on TF-IDF vectors; return the predicted ratings of ``test``, [N]."""
    from sklearn.linear_model import Ridge

    train_vectors, test_vectors = _tfidf_vectors(train, test)
    return Ridge(alpha=1.0).fit(train_vectors, ratings).predict(test_vectors)


def _tfidf_vectors(train: Sequence[str], test: Sequence[str]) -> tuple[Any, Any]:
    """Fit TF-IDF on ``train`` and return the vectors of the training and the test texts.

    If the training texts have no words, each text has the vector [0].
    """
    words = fit_tfidf(train, ngram_range=(1, 2), min_df=2 if len(train) > 50 else 1)
    if words is None:
        return np.zeros((len(train), 1)), np.zeros((len(test), 1))
    return words.transform(train), words.transform(test)
