"""Kinds of reward models that predict columns of ratings or binary labels of single texts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.config.reward import RewardConfig
from rlhf.data.labels import RANGE_COLUMNS
from rlhf.data.messages import RowDropped
from rlhf.reward_models import losses
from rlhf.reward_models.losses import IGNORED
from rlhf.reward_models.report import labeled
from rlhf.training.examples import Example
from rlhf.training.reward_models.base import Report, ReportInputs, RewardKind
from rlhf.training.reward_models.classification import LogOddsKind, class_report
from rlhf.training.reward_models.encoding import (
    RewardEncoder,
    Row,
    independent_unit_key,
    last_message_content,
)


class RegressionKind(RewardKind):
    """Kind of reward model whose outputs are ratings, with the squared-error loss.

    The labels [B, K] are the ratings in each of the K columns, or IGNORED if a rating is unknown.
    """

    problem_type = "regression"

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config)
        self.names = config.labels or ["label"]
        """Names of the columns to predict."""
        only_label = self.names == ["label"]
        self.data = "classification" if only_label else "rated"
        self.columns = () if only_label else tuple(self.names)

    @property
    def range_columns(self) -> tuple[str, ...]:
        return (RANGE_COLUMNS["ratings"],) if "rating" in self.names else ()

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        values = [_parse_rating(row[name], name) for name in self.names]
        if all(value == IGNORED for value in values):
            raise RowDropped("no rating")
        return Example([encoder.encode_labeled(row)], values)

    def loss(self, logits: Tensor, labels: Tensor, num_batch_labels: Any) -> Tensor:
        targets = torch.where(labels != IGNORED, labels.float(), torch.nan)
        return losses.regression_loss(logits, targets, num_targets=num_batch_labels)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        labels = labels.astype(float)
        error = (logits.astype(float) - labels)[labels != IGNORED]
        return {"rmse": float(np.sqrt((error**2).mean()))}

    def evaluate(self, inputs: ReportInputs) -> Report:
        """Return a report with the metrics of every column.

        If there are several columns, the names of metrics begin with the name of the column.
        """
        rows, logits = inputs.test_rows, inputs.logits_of_test_rows()
        report: Report = {
            "rows": len(rows),
            "units": len({independent_unit_key(row) for row in rows}),
            "metrics": {},
            "baselines": {"TF-IDF": {}},
            "gains": {"TF-IDF": {}},
        }
        for k, name in enumerate(self.names):
            known = [i for i, row in enumerate(rows) if row[name] is not None]
            column = self.evaluate_column(
                logits[known, k],
                [rows[i] for i in known],
                [row for row in inputs.train_rows if row[name] is not None],
                name,
            )
            prefix = f"{name}/" if len(self.names) > 1 else ""
            report["metrics"] |= _with_key_prefix(column["metrics"], prefix)
            for part in ("baselines", "gains"):
                report[part]["TF-IDF"] |= _with_key_prefix(column[part]["TF-IDF"], prefix)
        return report

    def evaluate_column(
        self, logits: np.ndarray, rows: list[Row], train_rows: list[Row], name: str
    ) -> Report:
        """Return the report of a column.

        Args:
            logits: [N], outputs of the model for the N rows.
            rows: Test rows with a known label in the column.
            train_rows: Rows with a known label, on which the baseline is fitted.
            name: Name of the column.
        """
        ridge = labeled.predict_ratings_from_words(
            [last_message_content(row) for row in train_rows],
            [float(row[name]) for row in train_rows],
            [last_message_content(row) for row in rows],
        )
        return labeled.labeled_report(
            labeled.RATING_MEASURES,
            logits,
            np.array([row[name] for row in rows], dtype=float),
            baselines={"TF-IDF": ridge},
            groups=[independent_unit_key(row) for row in rows],
        )


class MultiLabelKind(LogOddsKind, RegressionKind):
    """Kind of reward model whose outputs are the log-odds of binary labels.

    The labels [B, K] are 0 or 1 in each of the K columns, or IGNORED if a label is unknown.
    """

    problem_type = "multi_label_classification"

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        example = super().encode(encoder, row)
        if not set(example.labels) <= {0.0, 1.0, float(IGNORED)}:
            raise RowDropped("a label is neither 0 nor 1")
        return example

    def evaluate_column(
        self, logits: np.ndarray, rows: list[Row], train_rows: list[Row], name: str
    ) -> Report:
        return class_report(np.stack([np.zeros(len(rows)), logits], 1), rows, train_rows, name)


def _parse_rating(value: Any, name: str) -> float:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return float(IGNORED)
    if isinstance(value, str) or not math.isfinite(value) or value == IGNORED:
        raise RowDropped(f"{name} is not a rating (a finite number other than {IGNORED})")
    return float(value)


def _with_key_prefix(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}
