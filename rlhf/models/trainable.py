"""Set the trainable parameters and the dropout of a model.

Call these functions after a model is loaded, merged or copied, because these operations leave
different states. For example, PEFT leaves the base model frozen after a merge, and a new adapter is
in training mode although its base model is in evaluation mode.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.model import ModelSpec
from rlhf.errors import UserError
from rlhf.models.architecture import is_adapter_weight, unwrap_peft
from rlhf.models.sharding.tensors import local_part

log = logging.getLogger(__name__)

# Number of elements of a checksum that are summed at a time, to limit the memory of integer copies.
_CHECKSUM_CHUNK_ELEMENTS = 2**20


def make_trainable(model: Any) -> Any:
    """Set ``requires_grad`` of the trained parameters, disable dropout, and return the model.

    In a PEFT model, the adapters and ``modules_to_save`` are trained. In other models, all
    floating-point parameters are trained.

    Raises:
        UserError: There is no parameter to train.
    """
    model.requires_grad_(False)
    trained = trained_parameters(model)
    for parameter in trained:
        parameter.requires_grad_(True)
    if not trained:
        raise UserError(
            "the model has no parameter to train: it has no floating-point parameters or adapters"
        )
    return set_dropout(model, active=False)


def trained_parameters(model: Any) -> list[nn.Parameter]:
    """Return the parameters that are to be trained, even if they do not require gradients yet."""
    is_full = unwrap_peft(model) is model
    return [
        parameter
        for name, parameter in model.named_parameters()
        if (parameter.is_floating_point() if is_full else is_adapter_weight(name))
    ]


def parameter_names_without_gradient(model: nn.Module) -> list[str]:
    """Return the names of the trainable parameters that have no gradient after a backward pass.

    Parameters of experts are omitted, because an expert to which no token was routed has no
    gradient.
    """
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None and "experts" not in name.split(".")
    ]


def copy_model(model: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a copy of a model, also if its modules keep results of the last forward pass.

    For example, the layers of RecurrentGemma keep their recurrent states. After a forward pass with
    gradients, these are tensors of its graph, which cannot be copied. They are detached in the
    model before it is copied.

    Args:
        model: The model or module.
        memo: Object id -> copy of this object, as for `copy.deepcopy`.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
    return copy.deepcopy(model, memo)


def make_frozen(model: Any) -> Any:
    """Freeze all parameters, disable dropout, and return the model."""
    return set_dropout(model.requires_grad_(False), active=False)


def set_dropout(model: Any, *, active: bool) -> Any:
    """Enable or disable the dropout of a model and its adapters, and return the model.

    Dropout is active only in the updates of SFT and of reward models. Other losses (online
    algorithms, DPO, KTO) compare the log-probabilities of two forward passes. With dropout, the two
    passes would use different masks. The importance ratio would then not start at 1, and the loss
    of DPO would not start at ln 2.
    """
    return model.train(active)


def remove_model_dropout(model: Any) -> None:
    """Set the dropout rate to 0 in all dropout layers except those of adapters."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0


def warn_of_ignored_dropout(command: str, spec: ModelSpec) -> None:
    """Log a warning if the adapters have dropout, which ``command`` does not use."""
    if spec.lora and spec.lora.dropout:
        log.warning(
            "model.lora.dropout %g is ignored in %s, because its loss compares the "
            "log-probabilities of two forward passes; only sft and reward use dropout",
            spec.lora.dropout,
            command,
        )


class WeightChangeDetector:
    """Measures by checksums which trained parameter tensors of a model have changed.

    Args:
        model: The model before the first step, or before a checkpoint is loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._start = [_checksum(p) for p in self._parameters]

    def which_tensors_changed(self) -> list[bool]:
        """Return for each trained parameter tensor whether it differs from the start.

        Of a sharded tensor, the elements in this process are compared.
        """
        pairs = zip(self._parameters, self._start, strict=True)
        return [_checksum(p) != start for p, start in pairs]

    def changed_tensor_fraction(self) -> float:
        """Return the fraction of the trained parameter tensors that differ from the start."""
        changed = self.which_tensors_changed()
        return sum(changed) / len(changed)


@torch.no_grad()
def _checksum(parameter: torch.Tensor) -> int:
    """Return the sum of a tensor's elements, with their bits interpreted as integers.

    Of a sharded tensor, the elements in this process are summed.
    """
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = (
        local_part(parameter).detach().contiguous().view(-1).view(kinds[parameter.element_size()])
    )
    return sum(int(chunk.sum(dtype=torch.int64)) for chunk in flat.split(_CHECKSUM_CHUNK_ELEMENTS))
