"""How good a classifier or rater is on labelled texts, beside a bag of words, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reward_models.statistics import pearson, ranks, spearman
from reward_models.words import fit_words

Columns = dict[str, np.ndarray]
Estimate = dict[str, float]


def classification_report(
    logits: np.ndarray, labels: np.ndarray, *, rivals: dict[str, np.ndarray], seed: int = 0
) -> dict[str, Any]:
    """Accuracy, macro-F1 and AUC of class scores [N, C], and the paired gain over each rival's.

    Rows are resampled together, so that a gain is one between the same texts. AUC is the mean over
    the classes of one against the rest.
    """
    measures = {"accuracy": accuracy, "macro_f1": macro_f1, "auc": auc}
    return _compare(measures, logits, labels, rivals, seed)


def rating_report(
    predictions: np.ndarray, targets: np.ndarray, *, rivals: dict[str, np.ndarray], seed: int = 0
) -> dict[str, Any]:
    """Correlations and root mean squared error of predictions [N], and the gain over each rival."""
    measures = {"pearson": pearson, "spearman": spearman, "rmse": rmse}
    return _compare(measures, predictions, targets, rivals, seed)


def _compare(
    measures: dict[str, Callable[[np.ndarray, np.ndarray], float]],
    scores: np.ndarray,
    labels: np.ndarray,
    rivals: dict[str, np.ndarray],
    seed: int,
) -> dict[str, Any]:
    def of(theirs: np.ndarray, minus: np.ndarray | None = None) -> dict[str, Estimate]:
        found = {}
        for name, measure in measures.items():

            def statistic(rows: np.ndarray, measure: Any = measure) -> float:
                value = measure(theirs[rows], labels[rows])
                return value if minus is None else value - measure(minus[rows], labels[rows])

            found[name] = bootstrap(statistic, len(labels), seed)
        return found

    return {
        "rows": len(labels),
        "metrics": of(scores),
        "baselines": {name: of(theirs) for name, theirs in rivals.items()},
        "gains": {name: of(scores, theirs) for name, theirs in rivals.items()},
    }


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    size: int,
    seed: int,
    *,
    resamples: int = 500,
    confidence: float = 0.95,
) -> Estimate:
    """A statistic of row indices with a percentile interval over rows drawn with replacement."""
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(size, size=size)) for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    mean = statistic(np.arange(size))
    return {"mean": float(mean), "low": float(low), "high": float(high), "n": size}


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of the rows whose class scores highest; scores [N, C]."""
    return float((scores.argmax(1) == labels).mean())


def macro_f1(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the harmonic mean of precision and recall."""
    classes = scores.shape[1]
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, scores.argmax(1)), 1)
    right, both = counts.diagonal(), counts.sum(0) + counts.sum(1)
    return float((2 * right / np.maximum(both, 1)).mean())


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


def to_markdown(name: str, report: dict[str, Any]) -> str:
    """The report as a table: the model, each baseline, and the gain over it."""
    measures = list(report["metrics"])
    lines = [f"# {name}", "", f"{report['rows']:,} held-out rows; 95% intervals over rows.", ""]
    lines += ["| | " + " | ".join(measures) + " |", "|-|" + "-|" * len(measures)]
    rows = {"this model": report["metrics"], **report["baselines"]}
    rows |= {f"gain over {rival}": gain for rival, gain in report["gains"].items()}
    for label, values in rows.items():
        cells = [_interval(values[m]) if m in values else "" for m in measures]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _interval(value: Estimate) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
