"""Options of the native engine, with TRL's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Interval

from rlhf.common.ranges import (
    MAX_INT32,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
)
from rlhf.common.registry import OneOf, Registry
from rlhf.errors import UserError

_MODULE = "rlhf.training.optimizers"

OPTIMIZERS: Registry[str | Callable[..., Any]] = Registry(
    "optimizer", {"adamw": f"{_MODULE}:make_adamw", "sgd": f"{_MODULE}:make_sgd"}
)
"""Name of the optimizer -> function, or its name ``module:name``, that creates the optimizer from
parameters and `rlhf.training.optimizers.OptimizerSettings`. `rlhf.plugins.register_optimizer` adds
an optimizer."""
OptimizerName = Annotated[str, OneOf(OPTIMIZERS)]

_TRANSFORMERS_NAMES = {"adamw_torch_fused": "adamw", "adamw_torch": "adamw", "sgd": "sgd"}
"""`trainer.optim` -> name in `OPTIMIZERS`, for the names that transformers has."""


def native_optimizer_by_trainer_name() -> dict[str, str]:
    """Return `trainer.optim` -> name in `OPTIMIZERS`, including the optimizers of plug-ins."""
    return _TRANSFORMERS_NAMES | {name: name for name in OPTIMIZERS.sources}


@dataclass(frozen=True)
class NativeOptions:
    """Options of the native engine under `trainer:`, with TRL's defaults unless noted."""

    learning_rate: NonNegativeFloat
    """Peak learning rate."""
    num_train_epochs: PositiveFloat = 1.0
    """Number of epochs; TRL's default is 3."""
    max_steps: Annotated[int, Interval(ge=-1, le=MAX_INT32)] = -1
    """Number of optimizer steps. A positive number overrides num_train_epochs."""
    optim: str = "adamw_torch_fused"
    """adamw_torch_fused or adamw_torch (AdamW), sgd (without momentum), or the optimizer of a
    plug-in. The state of AdamW is float32."""
    lr_scheduler_type: str = "linear"
    """linear, cosine, constant, constant_with_warmup, or another of transformers' schedules."""
    warmup_steps: NonNegativeInt | None = None
    """Number of steps of linear warm-up. The default is the smaller of 10 and a tenth of all
    optimizer steps, rounded down."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    adam_beta1: FractionBelowOne = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: FractionBelowOne = 0.999
    """Decay rate of Adam's second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Adam's epsilon."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    logging_steps: PositiveInt | None = None
    """Number of steps between logged metrics. The default is the smaller of 10 and 1/20 of all
    optimizer steps, rounded down, but at least 1."""


@dataclass(frozen=True)
class DPOOptions(NativeOptions):
    """Options of DPO."""

    beta: PositiveFloat = 0.1
    """Coefficient of the KL to the reference policy, in units of reward per nat."""
    loss_type: Sequence[str] = ("sigmoid",)
    """[sigmoid], or [sigmoid, sft]; sft adds the mean negative log-likelihood of the chosen
    replies."""
    loss_weights: Sequence[NonNegativeFloat] | None = None
    """One weight for each loss in loss_type; the default is 1 for each."""

    @property
    def weight_by_loss(self) -> dict[str, float]:
        """Name of the loss -> weight."""
        return dict(
            zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True)
        )


@dataclass(frozen=True)
class RewardOptions(NativeOptions):
    """Options of reward models."""

    center_rewards_coefficient: NonNegativeFloat | None = None
    """Weight of a term in the loss: the squared sum of the two scores of a pair. The term centers
    the scores at 0."""
    disable_dropout: bool = True
    """Disable the dropout layers of the model, so that the two scores of a pair do not differ by
    random noise. Dropout in adapters is set by model.lora.dropout."""


OPTIONS_BY_COMMAND: dict[str, type[NativeOptions]] = {
    "sft": NativeOptions,
    "dpo": DPOOptions,
    "reward": RewardOptions,
}


def native_options(
    command: str, trainer_options: Mapping[str, Any], *, default_learning_rate: float
) -> NativeOptions:
    """Return the options of a command for the native engine.

    Args:
        command: Key of `OPTIONS_BY_COMMAND`.
        trainer_options: Name -> value, as under ``trainer`` in the configuration.
        default_learning_rate: Learning rate if ``trainer_options`` has none.

    Raises:
        UserError: An option is unknown to the native engine, or a value is invalid.
    """
    cls = OPTIONS_BY_COMMAND[command]
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [key for key in trainer_options if key not in known]
    if unknown:
        raise UserError(
            f"trainer.{unknown[0]} is not an option of the native engine: set engine: trl, or "
            f"remove the option (the native engine has {', '.join(known)})"
        )
    options = cls(**{"learning_rate": default_learning_rate, **trainer_options})
    _check_optimizer(options)
    if isinstance(options, DPOOptions):
        _check_losses(options)
    check_fields(options, "trainer.")
    return options


def _check_optimizer(options: NativeOptions) -> None:
    """Raise UserError for an unknown optimizer, or for an option of Adam that sgd does not have."""
    known = native_optimizer_by_trainer_name()
    if options.optim not in known:
        raise UserError(
            f"trainer.optim: the native engine has {', '.join(known)}, got "
            f"{options.optim}; for other optimizers set engine: trl"
        )
    if known[options.optim] == "sgd":
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if getattr(options, name) != getattr(NativeOptions, name):
                raise UserError(f"trainer.{name} has no effect with trainer.optim sgd")


def _check_losses(options: DPOOptions) -> None:
    # Without sigmoid, the loss does not depend on the rejected replies. If a name were repeated,
    # only its last weight would be used.
    if tuple(options.loss_type) not in (("sigmoid",), ("sigmoid", "sft"), ("sft", "sigmoid")):
        raise UserError(
            f"trainer.loss_type: the native engine has [sigmoid] and [sigmoid, sft], got "
            f"{options.loss_type}; for other losses set engine: trl"
        )
    weights = options.loss_weights
    if weights is not None and len(weights) != len(options.loss_type):
        raise UserError(
            f"trainer.loss_weights must have one weight for each loss_type, got {list(weights)} "
            f"for {list(options.loss_type)}"
        )
