"""Kinds of reward models that are trained on preference pairs, with variants of Bradley-Terry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.common.user_code import definition_location_text, guarded_call
from rlhf.config.reward import RewardConfig
from rlhf.data.labels import RANGE_COLUMNS
from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.evaluation.pairs import write_pair_evaluation
from rlhf.models.rewards import load_rewards
from rlhf.reward_models import Sidecar, losses
from rlhf.reward_models.checkpoint import keep_first_output
from rlhf.reward_models.core import Reward
from rlhf.reward_models.losses import IGNORED
from rlhf.runs.checksums import update_checksum
from rlhf.training.examples import Example
from rlhf.training.reward_models.base import ReportInputs, RewardKind
from rlhf.training.reward_models.encoding import RewardEncoder, Row

MAX_REPORT_PAIRS = 500
"""Maximum number of held-out pairs in the report if the configuration has no ``test_data``."""


class PairKind(RewardKind):
    """Base class of kinds whose examples are a chosen and a rejected text.

    The labels [B, M] are the margins for each of the M heads, or IGNORED for heads that are not
    trained on the pair.
    """

    data = "preference"

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config)
        self.uses_margin = config.margins
        self.centering = config.trainer.get("center_rewards_coefficient") or 0.0

    @property
    def centers_scores(self) -> bool:
        """Whether `loss` is that of this class, which reads ``center_rewards_coefficient``."""
        return type(self).loss is PairKind.loss

    @property
    def range_columns(self) -> tuple[str, ...]:
        return (RANGE_COLUMNS["pairs"],) if self.uses_margin else ()

    def check_columns(self, rows: Sequence[Row]) -> None:
        """Raise UserError if the loss uses margins and none of the rows has a margin."""
        if self.uses_margin and not any("margin" in row for row in rows):
            setting = "margins is true" if self.config.margins else f"kind: {self.config.kind}"
            raise UserError(
                f"{setting}, but the pairs have neither a margin column nor the scores of the "
                "chosen and the rejected reply"
            )

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        if self.uses_margin and "margin" not in row:
            raise RowDropped("no margin")
        margin = float(row["margin"]) if self.uses_margin else 0.0
        if margin < 0:  # with a negative margin, the loss of kind scaled has no lower bound
            raise RowDropped("margin below 0, which means that the rejected completion is better")
        return Example(encoder.encode_pair(row), encoder.bootstrap_labels_for_heads(margin))

    def loss(self, logits: Tensor, labels: Tensor, num_batch_labels: Any) -> Tensor:
        chosen, rejected = self.group_by_example(logits, labels).unbind(1)
        known = labels != IGNORED
        cells = self._checked_pair_losses(chosen, rejected, torch.where(known, labels.float(), 0.0))
        cells = losses.add_centering_penalty(cells, chosen, rejected, coef=self.centering)
        return torch.where(known, cells, 0.0).sum() / num_batch_labels

    def pair_losses(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        """Return the loss of each pair and head, [B, M], from scores and margins [B, M]."""
        raise NotImplementedError

    def _checked_pair_losses(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        """Return `pair_losses`, which a plug-in can define.

        Raises:
            UserError: The result has no gradient, or has another shape; a scalar, for example,
                would count for each pair.
        """
        what, shape = f"kind {self.config.kind}: pair_losses", list(chosen.shape)
        with guarded_call(self.pair_losses, what=what, advice="use tensor operations"):
            cells: Any = self.pair_losses(chosen, rejected, margin)
        if not isinstance(cells, Tensor) or list(cells.shape) != shape:
            found = f"{type(cells).__name__} of shape {list(getattr(cells, 'shape', ()))}"
            raise UserError(
                f"{what}{definition_location_text(self.pair_losses)} returned a {found}: return a "
                f"tensor of shape {shape}, the loss of each pair and head"
            )
        if torch.is_grad_enabled() and chosen.requires_grad and not cells.requires_grad:
            raise UserError(
                f"{what}{definition_location_text(self.pair_losses)} returned a tensor without a "
                "gradient: compute it from the scores, without detach"
            )
        return cells

    def group_by_example(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.reshape(len(labels), 2, -1)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        scores = self.scores(logits.astype(float))
        margin = scores[:, 0] - scores[:, 1]
        return {"accuracy": float((np.sign(margin) + 1).mean() / 2), "margin": float(margin.mean())}

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Return the scores [B, 2] of the two replies, which are means over the heads."""
        return logits.mean(-1)

    def report(self, inputs: ReportInputs) -> list[str]:
        """Write the report on pairs, and save the temperature with the model if it was fitted.

        Returns:
            The lines of the report that summarize the result.
        """
        rows = inputs.test_rows if self.config.test_data else inputs.test_rows[:MAX_REPORT_PAIRS]
        sidecar = Sidecar.read(inputs.run.final)
        assert sidecar is not None
        report = write_pair_evaluation(
            self.load_scorer(inputs),
            rows,
            inputs.run.directory,
            name=inputs.run.directory.name,
            train_rows=inputs.train_rows,
            dropped=inputs.dropped,
            stress_size=100,
            seed=self.config.seed,
        )
        temperature = report["calibration"]["fitted"]["temperature"]
        if temperature is not None:  # None if the model is no better than chance
            sidecar = dataclasses.replace(sidecar, temperature=temperature)
            update_checksum(sidecar.write(inputs.run.final))
        return report["verdict"]

    def load_scorer(self, inputs: ReportInputs) -> Reward:
        """Load the saved model as a reward whose higher scores are better."""
        if self.scorer == "learned":
            return inputs.load()
        return load_rewards({"kind": self.scorer, "path": str(inputs.run.final)})


class PreferenceKind(PairKind):
    """Bradley-Terry loss with optional margins and label smoothing."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config)
        self.in_trl = config.num_heads == 1 and not config.flip_rate

    def pair_losses(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        return losses.bradley_terry_loss(
            chosen, rejected, margin=margin, label_smoothing=self.config.flip_rate
        )


class UnbiasedKind(PairKind):
    """Bradley-Terry loss whose expected value over noisy labels is the loss on correct labels."""

    def pair_losses(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        return losses.unbiased_bradley_terry_loss(chosen, rejected, flip_rate=self.config.flip_rate)


class ScaledKind(PairKind):
    """Bradley-Terry loss that is weighted by the margin column, the strength of the preference."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config)
        self.uses_margin = True

    def pair_losses(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        return losses.scaled_bradley_terry_loss(chosen, rejected, strength=margin)


class LengthDebiasedKind(PairKind):
    """ODIN, in which a second head learns the effect of length and is removed after training.

    The labels [B, 2] are the lengths of the chosen and the rejected reply, in hundreds of
    characters. The loss contains the correlation of scores and lengths over the whole batch, so
    the configuration must set micro_batch_size equal to batch_size.
    """

    def output_names(self) -> list[str]:
        return ["quality", "length"]

    def encode(self, encoder: RewardEncoder, row: Row) -> Example:
        lengths = [
            sum(len(message["content"]) for message in row[side]) / 100
            for side in ("chosen", "rejected")
        ]
        return Example(encoder.encode_pair(row), lengths)

    def loss(self, logits: Tensor, labels: Tensor, num_batch_labels: Any) -> Tensor:
        chosen, rejected = self.group_by_example(logits, labels).unbind(1)
        lengths = labels.float()
        mean = losses.length_debiased_loss(
            (chosen[:, 0], rejected[:, 0]),
            (chosen[:, 1], rejected[:, 1]),
            (lengths[:, 0], lengths[:, 1]),
            coef=self.config.length_coef,
        )
        return mean * (labels.numel() / num_batch_labels)

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Return the scores [B, 2] of the first head, which predicts the quality."""
        return logits[..., 0]

    def before_saving(self, model: Any) -> None:
        keep_first_output(model, label="reward")
