"""The optimizers of the online algorithms, the native engine, and TRL with bfloat16 weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rlhf.common.imports import import_object
from rlhf.common.user_code import check_accepts_arguments, definition_location_text, guarded_call
from rlhf.config.optimization import OPTIMIZERS, native_optimizer_by_trainer_name
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


def make_adamw(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> MasterOptimizer:
    """Return AdamW."""
    return MasterAdamW(
        parameters,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        eps=settings.eps,
    )


def make_sgd(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> MasterOptimizer:
    """Return SGD without momentum."""
    return MasterSGD(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    settings: OptimizerSettings,
    *,
    sharded: bool = False,
) -> MasterOptimizer:
    """Return the optimizer ``name``.

    State and arithmetic of the toolkit's optimizers are in float32. An optimizer of torch from a
    plug-in determines its own dtypes.

    Args:
        name: Name in `OPTIMIZERS`.
        parameters: The trained parameters.
        settings: Settings of the optimizer.
        sharded: Whether checkpoints contain the state in shards.

    Raises:
        UserError: The name is unknown, or a plug-in did not return an optimizer, or returned an
            optimizer of torch for weights that need float32 master weights, or for sharded
            checkpoints.
    """
    make = import_object(OPTIMIZERS.require(name))
    what, location = f"optimizer {name!r}", definition_location_text(make)
    with guarded_call(make, what=what, advice="move slow work out of the function"):
        optimizer = make(parameters, settings)
    if isinstance(optimizer, MasterOptimizer):
        return optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"{what}{location} returned a {type(optimizer).__name__}: "
            "return a torch.optim.Optimizer"
        )
    check_accepts_arguments(
        optimizer.step,
        what=f"{what}{location}: {type(optimizer).__name__}.step",
        required_signature="step(self, closure=None)",
    )
    if any(p.dtype.itemsize < 4 for group in optimizer.param_groups for p in group["params"]):
        raise UserError(
            f"{what} has no float32 state: set model.dtype: float32, or return a "
            "rlhf.models.precision.MasterOptimizer"
        )
    if sharded:
        raise UserError(
            f"{what} has no state that can be saved in shards: set sharding: none, or return a "
            "rlhf.models.precision.MasterOptimizer"
        )
    return TorchOptimizerAdapter(optimizer)


class TorchOptimizerAdapter(MasterOptimizer):
    """Adds `clip_at_next_step` to an optimizer of torch. The weights must be at least float32.

    Args:
        inner: The optimizer. Its parameter groups are those of the adapter.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        torch.optim.Optimizer.__init__(self, inner.param_groups, inner.defaults)
        self.inner = inner
        self.param_groups = inner.param_groups
        self.master_weights = [group["params"] for group in inner.param_groups]
        self._divisor = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip the gradients as `clip_at_next_step` requested, and update the weights.

        ``closure`` is ignored.
        """
        for weight in (p for group in self.master_weights for p in group):
            if self._divisor is not None and weight.grad is not None:
                weight.grad.div_(self._divisor)
        self._divisor = None
        step = self.inner.step
        with guarded_call(step, what="the step of the optimizer", advice="use tensor operations"):
            step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned."""
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups


def toolkit_optimizer_name(optim: str) -> str:
    """Convert transformers' name of an optimizer to its name in `OPTIMIZERS`.

    Other optimizers have no float32 master weights, so small updates of bfloat16 weights would be
    lost.

    Args:
        optim: Value of ``trainer.optim``.

    Raises:
        UserError: No optimizer in `OPTIMIZERS` has this name.
    """
    known = native_optimizer_by_trainer_name()
    if optim not in known:
        raise UserError(
            f"trainer.optim: {optim} has no float32 master weights, so small updates are lost; "
            f"choose one of {', '.join(known)}, or set model.dtype: float32 and engine: trl"
        )
    return known[optim]


def optimizer_settings(options: Any) -> OptimizerSettings:
    """Return the optimizer's settings from options with transformers' names."""
    return OptimizerSettings(
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
    )


_HYPERPARAMETERS = ("initial_lr", "weight_decay", "betas", "eps")
"""Keys of a parameter group that come from the configuration. ``initial_lr``, the peak learning
rate, is added by a schedule."""


def read_hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the hyperparameters of each parameter group."""
    return [
        {k: group[k] for k in _HYPERPARAMETERS if k in group} for group in optimizer.param_groups
    ]


def restore_hyperparameters(
    optimizer: torch.optim.Optimizer, scheduler: Any, hyperparameters: Sequence[Mapping[str, Any]]
) -> None:
    """Set the hyperparameters of an optimizer whose state was loaded from a checkpoint.

    The state of an optimizer contains its hyperparameters, and that of a schedule the peak and the
    current learning rate. Without this function, a changed setting or number of steps would have no
    effect in a resumed run. If nothing has changed, this function changes no bit.

    Args:
        optimizer: The optimizer.
        scheduler: Its learning rate schedule.
        hyperparameters: Result of `read_hyperparameters` before the state was loaded.
    """
    for group, settings in zip(optimizer.param_groups, hyperparameters, strict=True):
        group.update(settings)
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [settings["initial_lr"] for settings in hyperparameters]
        set_scheduled_learning_rates(scheduler)


def set_scheduled_learning_rates(scheduler: LambdaLR) -> None:
    """Set the learning rates that the schedule has after its current number of updates."""
    factors = [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]
    rates = [peak * factor for peak, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
