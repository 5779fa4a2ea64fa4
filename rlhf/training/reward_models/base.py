"""The interface of a kind of reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rlhf.common.imports import import_object
from rlhf.config.data import Kind
from rlhf.config.reward import MODEL_KINDS, RewardConfig
from rlhf.models.rewards import with_packing
from rlhf.reward_models.learned import LearnedReward
from rlhf.reward_models.losses import IGNORED
from rlhf.reward_models.report.markdown import labeled_page, write_report
from rlhf.runs.directory import Run
from rlhf.training.examples import Example
from rlhf.training.reward_models.encoding import (
    RewardEncoder,
    Row,
    labeled_messages,
)

Report = dict[str, Any]


@dataclass(frozen=True)
class TrainedModel:
    """A saved reward model, and the rows on which its report is computed."""

    run: Run
    train_rows: list[Row]
    """Rows that it was trained on; the baselines are fitted on them."""
    test_rows: list[Row]
    """Rows that it was not trained on."""
    dropped: Mapping[str, int]
    """Reason -> number of test rows without an example."""
    dtype: str
    """Name of the dtype in which the model is loaded."""

    def load(self, **options: Any) -> LearnedReward:
        """Load the scorer of the saved model."""
        return with_packing(LearnedReward.load(self.run.final, dtype=self.dtype, **options))

    def logits(self) -> np.ndarray:
        """Return the raw outputs [N, K] for the labeled texts of the test rows."""
        reward = self.load(attributes="all")
        ids = [reward.encode(labeled_messages(row)) for row in self.test_rows]
        return reward.score_ids(ids).numpy()


class RewardKind:
    """A kind of reward model: its data, examples, loss, metrics and report.

    The logits of a batch have one row per text. The labels have one row per example, and a loss is
    a sum over the labels that are not IGNORED, divided by their number in the whole batch, so that
    micro-batches do not change the gradient.
    """

    data: Kind
    """Kind of the rows."""
    columns: tuple[str, ...] = ()
    """Additional columns that the rows have."""
    scorer = "learned"
    """Kind of reward that reads the checkpoint, see `rlhf.reward_models.KINDS`."""
    problem_type: str | None = None
    """The ``problem_type`` of transformers for the checkpoint."""
    per_token = False
    """Whether the head reads every token instead of the whole text."""
    append_eos = True
    """Whether texts of a decoder end with EOS."""
    in_trl = False
    """Whether TRL's reward trainer and the native engine implement the loss."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        if config.num_heads > 1:
            self.scorer = "heads"

    def outputs(self) -> list[str]:
        """Return the names of the model's outputs; a single score is called "reward"."""
        if self.config.num_heads > 1:
            return [f"head{i}" for i in range(self.config.num_heads)]
        return self.config.labels or ["reward"]

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raise UserError if no row has the columns that the kind needs."""

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        """Encode a row as an example with the kind's labels.

        Raises:
            RowDropped: The row cannot be an example.
        """
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor, count: Any) -> Tensor:
        """Return the loss of a micro-batch; ``count`` is the number of labels of the batch."""
        raise NotImplementedError

    def by_example(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Reshape logits to one row per example, for the metrics."""
        return logits

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return metrics of the held-out examples; ``logits`` have the shape of ``by_example``."""
        raise NotImplementedError

    def report(self, trained: TrainedModel) -> list[str]:
        """Evaluate the saved model, write the report, and return its main lines."""
        name = trained.run.directory.name
        report = self.evaluate(trained)
        page = labeled_page(name, report)
        summary = {"name": name, "env": self.data, "policy": name} | report
        write_report(trained.run.directory, summary, page)
        return page.splitlines()[2:]

    def evaluate(self, trained: TrainedModel) -> Report:
        """Return a report with metrics of the saved model and of the baselines on the test rows."""
        raise NotImplementedError

    def before_saving(self, model: Any) -> None:
        """Change the trained model before it is saved."""


def kind_of(config: RewardConfig) -> RewardKind:
    """Return the kind that a configuration names."""
    return import_object(MODEL_KINDS[config.kind].implementation)(config)


def known_accuracy(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the share of the known labels that are predicted correctly."""
    return {"accuracy": float((predicted == labels)[labels != IGNORED].mean())}
