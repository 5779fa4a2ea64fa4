"""Kinds of reward models that classify single texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.config.reward import RewardConfig
from rlhf.data.messages import RowDropped
from rlhf.reward_models.losses import IGNORED
from rlhf.reward_models.report import labeled
from rlhf.training.examples import Example
from rlhf.training.reward_models.base import (
    Report,
    ReportInputs,
    RewardKind,
    accuracy_of_known_labels,
)
from rlhf.training.reward_models.encoding import (
    RewardEncoder,
    Row,
    independent_unit_key,
    last_message_content,
)


def classification_kind(config: RewardConfig) -> RewardKind:
    """Return a `MultiClassKind` for more than two classes, otherwise a `BinaryKind`."""
    return MultiClassKind(config) if len(config.labels) > 2 else BinaryKind(config)


class LogOddsKind(RewardKind):
    """Base class of kinds whose outputs are log-odds, with the binary cross-entropy loss.

    The labels [B, K] are 0, 1 or IGNORED, for K outputs and B examples.
    """

    def loss(self, logits: Tensor, labels: Tensor, num_batch_labels: Any) -> Tensor:
        known = labels != IGNORED
        targets = torch.where(known, labels.float(), 0.0)
        cells = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return torch.where(known, cells, 0.0).sum() / num_batch_labels

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        correct = (logits > 0) == (labels > 0.5)
        return {"accuracy": float(correct[labels != IGNORED].mean())}


class ClassificationKind(RewardKind):
    """Base class of kinds that predict one class for each text."""

    data = "classification"

    def class_logits(self, logits: np.ndarray) -> np.ndarray:
        """Convert the model's outputs [N, K] to logits of the C classes, [N, C]."""
        return logits

    def evaluate(self, inputs: ReportInputs) -> Report:
        """Return a report with accuracy, macro-F1 and AUC of the model and of two baselines."""
        logits = self.class_logits(inputs.logits_of_test_rows())
        return class_report(logits, inputs.test_rows, inputs.train_rows, "label")


class BinaryKind(LogOddsKind, ClassificationKind):
    """Classifier of two classes, whose output is the log-odds of class 1.

    Several heads are an ensemble. The labels [B, M] are 0, 1 or IGNORED for each of the M heads.
    """

    def output_names(self) -> list[str]:
        if self.config.num_heads == 1 and self.config.labels:
            return self.config.labels[1:]
        return super().output_names()

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        label = _parse_class_index(row["label"], 2)
        return Example(
            [encoder.encode_labeled(row)], encoder.bootstrap_labels_for_heads(float(label))
        )

    def class_logits(self, logits: np.ndarray) -> np.ndarray:
        log_odds = logits.mean(1)
        return np.stack([np.zeros_like(log_odds), log_odds], 1)


class MultiClassKind(ClassificationKind):
    """Softmax classifier of more than two classes. The labels [B] are indices of classes."""

    problem_type = "single_label_classification"

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        label = _parse_class_index(row["label"], len(self.config.labels))
        return Example([encoder.encode_labeled(row)], label)

    def loss(self, logits: Tensor, labels: Tensor, num_batch_labels: Any) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum") / num_batch_labels

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return accuracy_of_known_labels(logits.argmax(-1), labels)


def class_report(
    logits: np.ndarray, rows: Sequence[Row], train_rows: Sequence[Row], label_column: str
) -> Report:
    """Return a report that compares the predicted classes with two baselines.

    Args:
        logits: [N, C], logits of the C classes for the N test rows.
        rows: The N test rows.
        train_rows: Rows on which the baselines are fitted.
        label_column: Name of the column with the index of the true class.
    """
    labels, train_labels = ([int(row[label_column]) for row in part] for part in (rows, train_rows))
    tf_idf = labeled.class_logprobs_from_words(
        [last_message_content(row) for row in train_rows],
        train_labels,
        [last_message_content(row) for row in rows],
        num_classes=logits.shape[1],
    )
    frequency = np.bincount(train_labels, minlength=logits.shape[1]).astype(float)
    return labeled.labeled_report(
        labeled.CLASS_MEASURES,
        logits,
        np.array(labels),
        baselines={"TF-IDF": tf_idf, "most common class": np.tile(frequency, (len(rows), 1))},
        groups=[independent_unit_key(row) for row in rows],
    )


def _parse_class_index(value: Any, count: int) -> int:
    if value not in range(count):
        raise RowDropped(f"label is not one of the classes 0 to {count - 1}")
    return int(value)
