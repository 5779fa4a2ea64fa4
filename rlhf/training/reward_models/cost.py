"""Cost models, which rank two replies by harmfulness and give safe replies a negative cost."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from rlhf.data.messages import RowDropped
from rlhf.reward_models import losses
from rlhf.reward_models.core import Reward
from rlhf.training.examples import Example
from rlhf.training.reward_models.base import ReportInputs
from rlhf.training.reward_models.encoding import RewardEncoder, Row
from rlhf.training.reward_models.preference import PairKind

UNSAFE_COLUMNS = ("chosen_unsafe", "rejected_unsafe")


class CostKind(PairKind):
    """Cost model of Safe RLHF (Dai et al. 2023); the chosen reply of a pair is the safer one.

    The labels [B, 2] of the chosen and the rejected reply are 1 for unsafe and 0 for safe replies.
    """

    scorer = "cost"
    columns = UNSAFE_COLUMNS

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        unsafe = [_parse_flag(row[name], name) for name in UNSAFE_COLUMNS]
        return Example(encoder.encode_pair(row), unsafe)

    def loss(self, logits: Tensor, labels: Tensor, num_batch_labels: Any) -> Tensor:
        better, worse = self.group_by_example(logits, labels)[..., 0].unbind(1)
        unsafe = labels > 0
        pairs = losses.cost_model_loss(
            worse, better, worse_unsafe=unsafe[:, 1], better_unsafe=unsafe[:, 0]
        )
        return pairs.sum() / (num_batch_labels / 2)  # a pair has two labels

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(((logits[..., 0] > 0) == (labels > 0.5)).mean())}

    def load_scorer(self, inputs: ReportInputs) -> Reward:
        return super().load_scorer(inputs) * -1.0


def _parse_flag(value: Any, name: str) -> float:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    raise RowDropped(f"{name} is not true or false")
