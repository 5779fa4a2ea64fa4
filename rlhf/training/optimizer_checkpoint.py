"""Save and load the state of an optimizer by the names of the parameters.

The format of `torch.distributed.checkpoint` does not depend on the number of processes: each
process writes the rows that it holds, and reads those that it needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint as distributed_checkpoint

from rlhf.models.sharding.tensors import tensor_from_local_rows
from rlhf.training.trainer import Trainer

OPTIMIZER_FOLDER = "optimizer"
SCHEDULE_FILE = "schedule.pt"
"""File with the hyperparameters of the optimizer and the state of the learning rate schedule."""


def save_optimizer_by_parameter(folder: Path, trainer: Trainer) -> None:
    """Write the state of the optimizer and its schedule to a folder.

    If the model is sharded, every process must call this function.
    """
    _save_or_load_states(distributed_checkpoint.save, _states_by_name(trainer), folder, trainer)
    if not trainer.world.sharded_model or distributed.get_rank() == 0:
        groups = trainer.optimizer.param_groups
        rates = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        schedule = {"groups": rates, "scheduler": trainer.scheduler.state_dict()}
        torch.save(schedule, folder / SCHEDULE_FILE)


def load_optimizer_by_parameter(folder: Path, trainer: Trainer) -> None:
    """Restore the state that `save_optimizer_by_parameter` wrote, in place.

    The number of processes may differ. If the model is sharded, every process must call this
    function.
    """
    pairs = _states_by_name(trainer)
    _save_or_load_states(distributed_checkpoint.load, pairs, folder, trainer)
    trainer.optimizer.load_parameter_states(pairs.values())
    saved = torch.load(folder / SCHEDULE_FILE, weights_only=True)
    for group, settings in zip(trainer.optimizer.param_groups, saved["groups"], strict=True):
        group.update(settings)
    trainer.scheduler.load_state_dict(saved["scheduler"])


def _save_or_load_states(
    function: Callable[..., Any],
    states: dict[str, tuple[Tensor, dict[str, Tensor]]],
    folder: Path,
    trainer: Trainer,
) -> None:
    """Save states to a folder, or load them from it in place.

    Args:
        function: `save` or `load` of `torch.distributed.checkpoint`.
        states: Result of `_states_by_name`.
        folder: Folder of the checkpoint.
        trainer: The trainer.
    """
    sharded = {name: _as_sharded(*pair) for name, pair in states.items()}
    if not any(sharded.values()):  # SGD with float32 weights has no state
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # with one process
        one_process = not trainer.world.sharded_model
        function(sharded, checkpoint_id=folder / OPTIMIZER_FOLDER, no_dist=one_process)


def _states_by_name(trainer: Trainer) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Return name -> (parameter, state). The state contains only the rows of this process."""
    names = {
        id(parameter): f"{module_name}.{name}"
        for module_name, module in trainer.model.modules().items()
        for name, parameter in module.named_parameters()
    }
    return {names[id(p)]: (p, state) for p, state in trainer.optimizer.parameter_states()}


def _as_sharded(parameter: Tensor, state: dict[str, Tensor]) -> dict[str, Any]:
    """Return a state in which the tensors are sharded like their parameter."""
    return {
        name: tensor_from_local_rows(parameter, value) if value.dim() else value
        for name, value in state.items()
    }
