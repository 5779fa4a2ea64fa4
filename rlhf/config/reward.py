"""The table of kinds of reward models, and the configuration of `rlhf reward`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Interval

from rlhf.common.names import did_you_mean
from rlhf.common.ranges import LabelNoise, NonNegativeFloat
from rlhf.common.registry import Registry
from rlhf.config.data import DataSpec
from rlhf.config.offline import OfflineConfig


@dataclass(frozen=True)
class RewardModelKind:
    """One kind of reward model."""

    implementation: str | Callable[..., Any]
    """Class or function, or its name ``module:name``, that creates the kind from the
    configuration."""
    settings: tuple[str, ...] = ()
    """Keys of `RewardConfig` that have an effect on this kind but not on all kinds."""


_MODULES = "rlhf.training.reward_models"

_BUILT_IN_KINDS = {
    "preference": RewardModelKind(
        f"{_MODULES}.preference:PreferenceKind", ("margins", "num_heads")
    ),
    "smoothed": RewardModelKind(
        f"{_MODULES}.preference:PreferenceKind", ("margins", "flip_rate", "num_heads")
    ),
    "unbiased": RewardModelKind(f"{_MODULES}.preference:UnbiasedKind", ("flip_rate", "num_heads")),
    "scaled": RewardModelKind(f"{_MODULES}.preference:ScaledKind", ("num_heads",)),
    "length_debiased": RewardModelKind(
        f"{_MODULES}.preference:LengthDebiasedKind", ("length_coef",)
    ),
    "cost": RewardModelKind(f"{_MODULES}.cost:CostKind"),
    "ranking": RewardModelKind(f"{_MODULES}.ranking:RankingKind"),
    "best_of": RewardModelKind(f"{_MODULES}.ranking:BestOfKind"),
    "pairwise": RewardModelKind(f"{_MODULES}.pairwise:PairwiseKind"),
    "regression": RewardModelKind(f"{_MODULES}.rated:RegressionKind", ("labels",)),
    "classification": RewardModelKind(
        f"{_MODULES}.classification:classification_kind", ("labels", "num_heads")
    ),
    "multilabel": RewardModelKind(f"{_MODULES}.rated:MultiLabelKind", ("labels",)),
    "process": RewardModelKind(f"{_MODULES}.process:ProcessKind", ("separator",)),
}

MODEL_KINDS: Registry[RewardModelKind] = Registry("kind of reward model", _BUILT_IN_KINDS)
"""All kinds of reward models. `rlhf.plugins.register_reward_model` adds a kind."""


@dataclass(frozen=True)
class RewardConfig(OfflineConfig):
    """Configuration of `rlhf reward`. docs/rewards.md describes the data of each kind."""

    kind: str = "preference"
    """Kind of reward model; it determines the data, the loss and the report (docs/rewards.md)."""
    margins: bool = False
    """Subtract the margin column of the pairs in the loss: -log sigmoid(difference of scores -
    margin)."""
    flip_rate: LabelNoise = 0.0
    """Expected fraction of pairs with a wrong label."""
    length_coef: NonNegativeFloat = 1.0
    """Weight of the length penalty relative to the loss on pairs."""
    labels: list[str] = field(default_factory=list)
    """For regression and multilabel, names of the columns to predict (default of regression:
    label). For classification, names of the classes 0, 1, ...; with more than two classes, the
    model has one output for each class."""
    num_heads: Annotated[int, Interval(ge=1, le=1024)] = 1
    """Number of heads on one backbone. Several heads form an ensemble, in which each head is
    trained on a different sample of the rows."""
    separator: str = "\n\n"
    """Text that ends each step of a solution."""
    test_data: list[DataSpec] = field(default_factory=list)
    """Rows for the final report. If the list is empty, the report uses the held-out rows, although
    the checkpoint was selected on these rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in MODEL_KINDS:
            hint = did_you_mean(self.kind, MODEL_KINDS)
            raise ValueError(
                f"kind must be one of {', '.join(MODEL_KINDS)}, got {self.kind!r}{hint}"
            )
        for name in dict.fromkeys(name for row in MODEL_KINDS.values() for name in row.settings):
            default = getattr(RewardConfig, name, [])
            if getattr(self, name) != default and name not in MODEL_KINDS[self.kind].settings:
                kinds = ", ".join(kind for kind, row in MODEL_KINDS.items() if name in row.settings)
                raise ValueError(f"{name} has no effect on kind: {self.kind} (only on {kinds})")
        if "flip_rate" in MODEL_KINDS[self.kind].settings and self.flip_rate == 0:
            raise ValueError(
                f"kind: {self.kind} needs flip_rate > 0; without label noise, use kind: preference"
            )
        if self.kind == "classification":
            self._check_classes()
        if self.kind == "multilabel" and not self.labels:
            raise ValueError(
                "kind: multilabel needs labels: the names of the columns with values 0 and 1"
            )
        if self.kind == "length_debiased" and self.micro_batch_size != self.batch_size:
            raise ValueError(
                "kind: length_debiased computes the correlation of scores and lengths over the "
                "whole batch: set micro_batch_size equal to batch_size, got "
                f"{self.micro_batch_size} and {self.batch_size}"
            )
        if not self.separator:
            raise ValueError("separator is empty: give the text that ends each step")

    def _check_classes(self) -> None:
        if len(self.labels) == 1:
            raise ValueError(f"labels must name at least two classes, got {self.labels}")
        if len(self.labels) > 2 and self.num_heads > 1:
            raise ValueError("num_heads above 1 is only supported with two classes")
