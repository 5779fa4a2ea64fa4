"""`RewardKind`, the interface of a kind of reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rlhf.common.imports import import_object
from rlhf.common.user_code import guarded_call
from rlhf.config.data import Kind
from rlhf.config.reward import MODEL_KINDS, RewardConfig
from rlhf.models.rewards import enable_reward_packing
from rlhf.reward_models.learned import LearnedReward
from rlhf.reward_models.losses import IGNORED
from rlhf.reward_models.report.markdown import labeled_report_markdown, write_evaluation_report
from rlhf.runs.directory import Run
from rlhf.training.examples import Example
from rlhf.training.reward_models.encoding import (
    RewardEncoder,
    Row,
    labeled_messages,
)

Report = dict[str, Any]


@dataclass(frozen=True)
class ReportInputs:
    """A saved reward model, and the rows on which its report is computed."""

    run: Run
    train_rows: list[Row]
    """Rows on which the model was trained; the baselines are fitted on them."""
    test_rows: list[Row]
    """Rows on which the model was not trained; the report is computed on them."""
    dropped: Mapping[str, int]
    """Reason -> number of test rows that were dropped."""
    dtype: str
    """Name of the dtype in which the model is loaded."""

    def load(self, **options: Any) -> LearnedReward:
        """Load the saved model as a reward; ``options`` are those of `LearnedReward.load`."""
        return enable_reward_packing(
            LearnedReward.load(self.run.final, dtype=self.dtype, **options)
        )

    def logits_of_test_rows(self) -> np.ndarray:
        """Return the K raw outputs of the model for each of the N test rows, [N, K]."""
        reward = self.load(attributes="all")
        ids = [reward.encode(labeled_messages(row)) for row in self.test_rows]
        return reward.logits_of_token_ids(ids).numpy()


class RewardKind:
    """A kind of reward model, which defines its data, examples, loss, metrics and report.

    The logits of a batch have one row per text, and the labels have one row per example. A loss is
    a sum over the labels that are not IGNORED, divided by the number of these labels in the whole
    batch, so that the size of micro-batches does not change the gradient.
    """

    data: Kind
    """Kind of the dataset rows."""
    columns: tuple[str, ...] = ()
    """Additional columns of the dataset that the kind reads."""
    scorer = "learned"
    """Kind of reward that loads the saved model, see `rlhf.reward_models.KINDS`."""
    problem_type: str | None = None
    """Value of transformers' ``problem_type`` in the saved model's configuration."""
    per_token = False
    """Whether the model has outputs for every token, instead of only for the whole text."""
    append_eos = True
    """Whether EOS is appended to the texts if the model is a decoder."""
    in_trl = False
    """Whether TRL's reward trainer implements the loss. The native engine trains the same kinds."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        if config.num_heads > 1:
            self.scorer = "heads"

    @property
    def centers_scores(self) -> bool:
        """Whether the loss reads ``trainer.center_rewards_coefficient``."""
        return False

    @property
    def range_columns(self) -> tuple[str, ...]:
        """Columns of `rlhf.data.labels.RANGE_COLUMNS` that must be equal in all rows."""
        return ()

    def output_names(self) -> list[str]:
        """Return the names of the model's outputs; a single score is called "reward"."""
        if self.config.num_heads > 1:
            return [f"head{i}" for i in range(self.config.num_heads)]
        return self.config.labels or ["reward"]

    def check_columns(self, rows: Sequence[Row]) -> None:
        """Raise UserError if none of the rows has the columns that the kind needs."""

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        """Encode a row as an example with the labels of this kind.

        Raises:
            RowDropped: The row cannot be encoded; the message is the reason.
        """
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor, num_batch_labels: Any) -> Tensor:
        """Return the loss of a micro-batch, a scalar.

        Args:
            logits: [N, K], the K outputs for each of the N texts of the micro-batch; [N, T, K] if
                the kind is ``per_token``.
            labels: Labels of the examples of the micro-batch.
            num_batch_labels: Number of labels in the whole batch that are not IGNORED.
        """
        raise NotImplementedError

    def group_by_example(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Reshape logits with one row per text to one row per example, for the metrics."""
        return logits

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute metrics of the held-out examples.

        Args:
            logits: Logits of all examples, in the shape of `group_by_example`.
            labels: Labels of all examples.
        """
        raise NotImplementedError

    def report(self, inputs: ReportInputs) -> list[str]:
        """Evaluate the saved model, write the report, and return the lines to log."""
        name = inputs.run.directory.name
        report = self.evaluate(inputs)
        page = labeled_report_markdown(name, report)
        summary = {"name": name, "env": self.data, "policy": name} | report
        write_evaluation_report(inputs.run.directory, summary, page)
        return page.splitlines()[2:]

    def evaluate(self, inputs: ReportInputs) -> Report:
        """Return a report with metrics of the saved model and of baselines on the test rows."""
        raise NotImplementedError

    def before_saving(self, model: Any) -> None:
        """Modify the trained model in place before it is saved; by default, do nothing."""


def reward_kind_of(config: RewardConfig) -> RewardKind:
    """Return the kind of reward model with the name ``config.kind``."""
    implementation = import_object(MODEL_KINDS[config.kind].implementation)
    with guarded_call(implementation, what=f"kind {config.kind}"):
        return implementation(config)


def accuracy_of_known_labels(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return ``accuracy``: the fraction of correct predictions among labels other than IGNORED."""
    return {"accuracy": float((predicted == labels)[labels != IGNORED].mean())}
