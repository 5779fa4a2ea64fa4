"""Replace the forward methods of modules with faster, numerically equivalent methods."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def replace_forward(
    model: nn.Module,
    forward: Callable[..., Any],
    *,
    is_supported: Callable[[Any], bool],
    has_same_outputs: Callable[[Any], bool],
) -> int:
    """Replace the forward method of all matching modules; return the number of replacements.

    Args:
        model: Model, which is changed in place. Deep copies of the model keep the new methods.
        forward: New method, called with the module and the arguments of the original method.
        is_supported: Returns whether a module has the attributes that ``forward`` uses.
        has_same_outputs: Returns whether ``forward`` and the module's own method give equal
            outputs; called once per class.
    """
    is_same: dict[type, bool] = {}
    count = 0
    for module in model.modules():
        if is_supported(module):
            kind = type(module)
            if kind not in is_same:
                is_same[kind] = has_same_outputs(module)
            if is_same[kind]:
                module.forward = types.MethodType(forward, module)
                count += 1
    return count


def gives_same_outputs(
    module: Any, forward: Callable[[Any, Tensor], Tensor], *, width: int, dtype_as: Tensor
) -> bool:
    """Return whether a new forward method gives the same outputs as the module's own method.

    Outputs are the same if they differ by at most 1% of the largest output. The methods are
    compared on random inputs.

    Args:
        module: Module, whose own forward method is the reference.
        forward: New method, which takes the module and inputs [3, width].
        width: Size of the last dimension of the inputs.
        dtype_as: Tensor with the dtype and the device of the inputs.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, width, generator=generator).to(dtype_as)
    expected, actual = module(x), forward(module, x)
    return bool((expected - actual).abs().max() <= 1e-2 * expected.abs().max())


def restore_forward(model: nn.Module) -> None:
    """Undo ``replace_forward`` in all modules of a model."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), types.MethodType):
            del module.forward


def copy_replaced_forwards(source: nn.Module, target: nn.Module) -> None:
    """Replace the forward methods of a model as ``replace_forward`` did in another model.

    Args:
        source: Model in which forward methods are replaced.
        target: Model with modules of the same classes.
    """
    replaced: dict[type, Any] = {
        type(module): method.__func__
        for module in source.modules()
        if isinstance(method := vars(module).get("forward"), types.MethodType)
    }
    for module in target.modules():
        if type(module) in replaced:
            module.forward = types.MethodType(replaced[type(module)], module)
