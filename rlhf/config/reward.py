"""The configuration of `rlhf reward`; no torch here, so that parsing stays quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.config.data import DataSpec
from rlhf.config.offline import OfflineConfig

RewardKindName = Literal[
    "preference",
    "smoothed",
    "unbiased",
    "scaled",
    "length_debiased",
    "cost",
    "ranking",
    "best_of",
    "pairwise",
    "regression",
    "classification",
    "multilabel",
    "process",
]

# Setting -> the kinds on which it has an effect; elsewhere it is refused.
USED_BY: dict[str, tuple[str, ...]] = {
    "margins": ("preference", "smoothed"),
    "flip_rate": ("smoothed", "unbiased"),
    "length_coef": ("length_debiased",),
    "labels": ("regression", "classification", "multilabel"),
    "num_heads": ("preference", "smoothed", "unbiased", "scaled", "classification"),
    "separator": ("process",),
}


@dataclass(frozen=True)
class RewardConfig(OfflineConfig):
    """One run of `rlhf reward`. What each kind learns from: docs/rewards.md."""

    kind: RewardKindName = "preference"
    """What is learned: from pairs, rankings, labelled texts or labelled steps."""
    margins: bool = False
    """Use the pairs' margin column: -log sigmoid(difference - margin)."""
    flip_rate: float = 0.0
    """Share of the pairs that are believed to be labelled the wrong way round."""
    length_coef: float = 1.0
    """Weight of the length penalty against the loss on pairs."""
    labels: list[str] = field(default_factory=list)
    """regression, multilabel: the columns to predict (default: label). classification: names of the
    classes 0, 1, ...; more than two give one output each."""
    num_heads: int = 1
    """Heads on one backbone, each trained on its own draw of the rows: an ensemble in one pass."""
    separator: str = "\n\n"
    """Text that ends each step of a solution."""
    test_data: list[DataSpec] = field(default_factory=list)
    """Rows for the report at the end. Empty: the held-out rows, which also chose the checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kinds in USED_BY.items():
            default = [] if name == "labels" else getattr(RewardConfig, name)
            if getattr(self, name) != default and self.kind not in kinds:
                raise ValueError(
                    f"{name} has no effect on kind: {self.kind} (only on {', '.join(kinds)})"
                )
        if not 0 <= self.flip_rate < 0.5:
            raise ValueError(f"flip_rate must be in [0, 0.5), got {self.flip_rate}")
        if self.kind in USED_BY["flip_rate"] and self.flip_rate == 0:
            raise ValueError(f"kind: {self.kind} needs a flip_rate above 0; without it: preference")
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be >= 1, got {self.num_heads}")
        if self.kind == "classification":
            self._check_classes()
        if self.kind == "multilabel" and not self.labels:
            raise ValueError("multilabel needs labels: the columns that hold 0 or 1")
        if self.kind == "length_debiased" and self.micro_batch_size != self.batch_size:
            raise ValueError(
                "length_debiased correlates scores with lengths over the whole batch: set "
                f"micro_batch_size = batch_size, got {self.micro_batch_size} and {self.batch_size}"
            )
        if not self.separator:
            raise ValueError("separator is empty: name the text that ends a step")

    def _check_classes(self) -> None:
        if len(self.labels) == 1:
            raise ValueError(f"labels names the classes 0, 1, ...: one is not enough {self.labels}")
        if len(self.labels) > 2 and self.num_heads > 1:
            raise ValueError("num_heads needs two classes: more of them have an output each")
