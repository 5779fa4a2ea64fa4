"""Process reward models, which classify every step of a solution as correct or wrong."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from torch import Tensor

from rlhf.data.messages import RowDropped
from rlhf.data.splits import prompt_key
from rlhf.reward_models import losses
from rlhf.reward_models.chat_template import prompt_with_tools
from rlhf.reward_models.core import Conversation, score_each
from rlhf.reward_models.losses import IGNORED
from rlhf.reward_models.process import ProcessReward, encode_steps
from rlhf.reward_models.report import labeled
from rlhf.training.examples import Example
from rlhf.training.reward_models.base import (
    Report,
    ReportInputs,
    RewardKind,
    accuracy_of_known_labels,
)
from rlhf.training.reward_models.encoding import RewardEncoder, Row

log = logging.getLogger(__name__)


class ProcessKind(RewardKind):
    """Kind that classifies every step of a solution, at the last token of the step.

    The labels [B, T] are 1 at the last token of a correct step, 0 at the last token of a wrong
    step, and IGNORED at all other tokens.
    """

    data = "steps"
    scorer = "process"
    per_token = True

    def output_names(self) -> list[str]:
        return ["wrong", "right"]

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        steps = encode_steps(
            encoder.tokenizer, self._solution_conversation(row), separator=self.config.separator
        )
        if len(steps.ends) != len(row["labels"]):
            raise RowDropped("a step is empty or contains the separator")
        labels = [IGNORED] * len(steps.ids)
        for end, label in zip(steps.ends, row["labels"], strict=True):
            labels[end] = IGNORED if label is None else int(label)
        if len(steps.ids) > self.config.max_length:
            raise RowDropped("longer than max_length")
        return Example([steps.ids], labels)

    def loss(self, logits: Tensor, labels: Tensor, num_batch_labels: Any) -> Tensor:
        return losses.step_end_loss(logits, labels, num_steps=num_batch_labels)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return accuracy_of_known_labels(logits.argmax(-1), labels)

    def evaluate(self, inputs: ReportInputs) -> Report:
        """Return a report with the accuracy on steps.

        The baseline predicts the more common class of the training data for every step.
        """
        reward = ProcessReward.load(inputs.run.final, dtype=inputs.dtype)
        train_labels = [label for row in inputs.train_rows for label in row["labels"]]
        known = [bool(label) for label in train_labels if label is not None]
        majority = bool(np.mean(known) >= 0.5)
        correct, by_majority, groups = [], [], []
        solutions = [self._solution_conversation(row) for row in inputs.test_rows]
        scored, _, problems = score_each(reward.step_scores, solutions, name="report")
        for reason, count in problems.items():
            log.warning("%s: %d rows omitted", reason, count)
        for row, scores in zip(inputs.test_rows, scored, strict=True):
            if scores is None:
                continue
            for score, label in zip(scores, row["labels"], strict=True):
                if label is not None:
                    correct.append(float((score > 0.5) == bool(label)))
                    by_majority.append(float(majority == bool(label)))
                    groups.append(prompt_key(row))
        return labeled.accuracy_report(
            correct, baselines={"most common label": by_majority}, groups=groups
        )

    def _solution_conversation(self, row: Row) -> Conversation:
        reply = "".join(step + self.config.separator for step in row["steps"])
        return [*prompt_with_tools(row), {"role": "assistant", "content": reply}]
