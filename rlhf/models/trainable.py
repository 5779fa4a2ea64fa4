"""Which parameters of a model are trained, and whether its dropout is active.

Every model of a run passes through here after it is loaded, merged or copied. Loaders leave flags
behind that say nothing about the run: PEFT freezes a base model and leaves it frozen when the
adapter is merged into it, and a freshly made adapter is in training mode although the model under
it is not.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from rlhf.config.model import ModelSpec
from rlhf.errors import UserError
from rlhf.models.architecture import unwrap_peft

log = logging.getLogger(__name__)

# Elements of a tensor that a checksum converts at a time.
_AT_ONCE = 2**20


def make_trainable(model: Any) -> Any:
    """Mark what training moves, with dropout off; returns the model.

    Of a PEFT model these are the adapters and the modules that are trained whole beside them; of
    any other model all parameters.

    Raises:
        UserError: nothing is left to train.
    """
    if unwrap_peft(model) is model:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_of_adapter(name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the model has no parameter to train")
    return set_dropout(model, active=False)


def make_frozen(model: Any) -> Any:
    """Mark nothing for training, with dropout off; returns the model."""
    return set_dropout(model.requires_grad_(False), active=False)


def set_dropout(model: Any, *, active: bool) -> Any:
    """Switch the dropout of a model and of its adapters; returns the model.

    Dropout acts in the updates of SFT and of reward models and nowhere else. Sampling, evaluation
    and references read the model as it will be used, and a loss that compares log-probabilities of
    two passes (online algorithms, DPO, KTO) would measure the noise between two dropout masks:
    the importance ratio would not start at 1, nor DPO's loss at ln 2.
    """
    return model.train(active)


def remove_own_dropout(model: Any) -> None:
    """Set the rate of every dropout layer to 0, except those of adapters."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0


def warn_of_dropout(verb: str, spec: ModelSpec) -> None:
    """Log that a stage leaves the dropout off that its adapters are configured with."""
    if spec.lora and spec.lora.dropout:
        log.warning(
            "model.lora.dropout %g is off in %s, which compares log-probabilities of two passes; "
            "it acts in sft and reward",
            spec.lora.dropout,
            verb,
        )


class Movement:
    """Whether training moves a model: its trained tensors against what they are now.

    Args:
        model: before the first step, or before a checkpoint is read into it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._start = [_checksum(p) for p in self._parameters]

    def share(self) -> float:
        """Share of the trained tensors that differ from the start."""
        pairs = zip(self._parameters, self._start, strict=True)
        return sum(_checksum(p) != start for p, start in pairs) / len(self._parameters)


@torch.no_grad()
def _checksum(parameter: torch.Tensor) -> int:
    """Sum of the bits of a tensor, read as integers."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = parameter.detach().contiguous().view(-1).view(kinds[parameter.element_size()])
    return sum(int(part.sum(dtype=torch.int64)) for part in flat.split(_AT_ONCE))


def _of_adapter(name: str) -> bool:
    """Whether PEFT trains a parameter of that name."""
    return "lora_" in name or ".modules_to_save." in name
