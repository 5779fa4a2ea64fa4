"""Options of the native engine, under the names that TRL gives them; no torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.errors import UserError


@dataclass(frozen=True)
class NativeOptions:
    """What `trainer.` may set on the native engine. Defaults are TRL's, except where said."""

    learning_rate: float
    """Peak learning rate."""
    num_train_epochs: float = 1
    """Passes over the data; TRL's default is 3."""
    max_steps: int = -1
    """Optimizer steps; overrules num_train_epochs when positive."""
    lr_scheduler_type: str = "linear"
    """linear, cosine, constant, constant_with_warmup, or another of transformers' schedules."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; None: a tenth of the steps, at most 10."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of the gradient's mean."""
    adam_beta2: float = 0.999
    """Decay of the gradient's square."""
    adam_epsilon: float = 1e-8
    """Added to the denominator."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    logging_steps: int | None = None
    """Steps between metrics; None: twenty times over the run, at least every ten."""


@dataclass(frozen=True)
class DPOOptions(NativeOptions):
    """And those of DPO."""

    beta: float = 0.1
    """Weight of the divergence from the reference, reward per nat."""
    label_smoothing: float = 0.0
    """Share of pairs that are believed to be labelled the wrong way round."""
    loss_type: Literal["sigmoid"] = "sigmoid"
    """The native engine has this one."""


@dataclass(frozen=True)
class RewardOptions(NativeOptions):
    """And those of a reward model."""

    center_rewards_coefficient: float | None = None
    """Weight of the squared sum of a pair's scores, which centres them at 0."""


OPTIONS: dict[str, type[NativeOptions]] = {
    "sft": NativeOptions,
    "dpo": DPOOptions,
    "reward": RewardOptions,
}


def native_options(verb: str, given: Mapping[str, Any], *, learning_rate: float) -> NativeOptions:
    """The options of a verb.

    Raises:
        UserError: one that only TRL knows.
    """
    cls = OPTIONS[verb]
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UserError(
            f"trainer.{unknown[0]} is an option of TRL: set engine: trl, or leave it out "
            f"(the native engine takes {', '.join(known)})"
        )
    options = cls(**{"learning_rate": learning_rate, **given})
    if getattr(options, "loss_type", "sigmoid") != "sigmoid":
        raise UserError("trainer.loss_type: the native engine has sigmoid; for others, engine: trl")
    return options
