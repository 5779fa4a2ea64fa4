"""The optimizers of the online algorithms, the native engine, and TRL with bfloat16 weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlhf.config.optimization import TRAINER_OPTIMIZERS
from rlhf.errors import UserError
from rlhf.models.precision import MasterAdamW, MasterOptimizer, MasterSGD


@dataclass(frozen=True)
class OptimizerSettings:
    """Hyperparameters of an optimizer. SGD ignores ``betas`` and ``eps``."""

    learning_rate: float
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: float = 1e-8
    """Adam's epsilon."""


def _make_adamw(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> MasterOptimizer:
    return MasterAdamW(
        parameters,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        eps=settings.eps,
    )


def _make_sgd(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> MasterOptimizer:
    return MasterSGD(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], OptimizerSettings], MasterOptimizer]] = {
    "adamw": _make_adamw,
    "sgd": _make_sgd,
}
"""Name of the optimizer -> function that creates it from parameters and settings."""


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], settings: OptimizerSettings
) -> MasterOptimizer:
    """Return the optimizer ``name``. Its state and arithmetic are in float32."""
    return OPTIMIZERS[name](parameters, settings)


def optimizer_name(optim: str) -> str:
    """Convert transformers' name of an optimizer to its name in `OPTIMIZERS`.

    The state of other optimizers has the dtype of the weights, so small updates would be lost.

    Args:
        optim: Value of ``trainer.optim``.

    Raises:
        UserError: No optimizer in `OPTIMIZERS` has this name.
    """
    if optim not in TRAINER_OPTIMIZERS:
        known = ", ".join(TRAINER_OPTIMIZERS)
        raise UserError(
            f"trainer.optim: the state of {optim} has the dtype of the weights, so small updates "
            f"are lost; choose one of {known}, or set model.dtype: float32 and engine: trl"
        )
    return TRAINER_OPTIMIZERS[optim]


def optimizer_settings(options: Any) -> OptimizerSettings:
    """Return the optimizer's settings from options with transformers' names."""
    return OptimizerSettings(
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
    )
