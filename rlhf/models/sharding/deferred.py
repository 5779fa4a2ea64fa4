"""Models whose weights are not loaded yet, so that each process can load only its own rows.

The parameters of such a model are on the meta device. `rlhf.models.sharding.modules` replaces them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from rlhf.models.architecture import unwrap_peft
from rlhf.models.sharding.tensors import RowSource, row_range

# In-place functions that set the initial values of parameters.
_INITIALIZERS = {
    *("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_"),
    *("fill_", "constant_", "ones_", "zero_", "zeros_"),
}


class DeferredWeights:
    """The source of a model's weights, and the device on which they will be.

    Deep copies of the model have the same source.
    """

    def __init__(self, source: RowSource, device: torch.device) -> None:
        self.source, self.device = source, device

    def __deepcopy__(self, memo: Any) -> DeferredWeights:
        return self

    def rows_of_process(self, name: str, parameter: Tensor, mesh: DeviceMesh) -> Tensor:
        """Return the rows of this process for a parameter on the meta device.

        Args:
            name: Name of the parameter in the Transformers model; ``.base_layer`` is ignored.
            parameter: The parameter. If it is not sharded, all rows are returned.
            mesh: Mesh of the processes.
        """
        name = re.sub(r"(\.base_layer)+\.", ".", name)
        if not isinstance(parameter, DTensor):
            return self.source.whole_tensor(name).to(parameter.dtype)
        start, stop = row_range(len(parameter), rank=mesh.get_local_rank(), world_size=mesh.size())
        if start == stop:
            return torch.empty(0, *parameter.shape[1:], dtype=parameter.dtype)
        return self.source.tensor_rows(name, start, stop).to(parameter.dtype)


def deferred_weights_of(model: Any) -> DeferredWeights | None:
    """Return the source of the weights of a model, or None if its weights are loaded."""
    return getattr(unwrap_peft(model), "deferred_weights", None)


def device_of(model: Any) -> torch.device:
    """Return the device of a model, or the device on which its weights will be."""
    deferred = deferred_weights_of(model)
    return model.device if deferred is None else deferred.device


class _InitialRowsRecorder(TorchFunctionMode):
    """Context in which the initial values of parameters on the meta device are drawn and kept.

    Each parameter is drawn as a whole, with the same random numbers as without this context. Only
    the rows of one process are kept.

    Args:
        rank: Rank of the process.
        world_size: Number of processes.
    """

    def __init__(self, *, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self.rows_by_id: dict[int, tuple[Tensor, int, Tensor]] = {}
        """id -> (parameter, index of the first row, rows)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        target = kwargs.get("tensor", args[0] if args else None)
        if (
            getattr(func, "__name__", "") in _INITIALIZERS
            and isinstance(target, Tensor)
            and target.is_meta
        ):
            whole = torch.empty(target.shape, dtype=target.dtype)
            func(
                *(whole if value is target else value for value in args),
                **{key: whole if value is target else value for key, value in kwargs.items()},
            )
            self._keep_rows_of_process(target, whole)
        return result

    def _keep_rows_of_process(self, target: Tensor, whole: Tensor) -> None:
        """Keep the values of this process: its rows, or all rows of a parameter with few rows.

        If ``target`` is a view of one row of a parameter, such as the padding row of an embedding,
        ``whole`` replaces the kept values of this row.
        """
        if target._base is not None:
            _, first, rows = self.rows_by_id[id(target._base)]
            row = int(target.storage_offset()) // target.numel() - first
            if 0 <= row < len(rows):
                rows[row] = whole
            return
        first, last = 0, len(whole)
        if last >= self.world_size:  # smaller parameters are not sharded
            first, last = row_range(last, rank=self.rank, world_size=self.world_size)
        self.rows_by_id[id(target)] = (target, first, whole[first:last].clone())


class _InitialRows:
    """The rows of this process of the initial values of a model.

    Args:
        rows: Name of a parameter -> (index of the first row, rows).
    """

    def __init__(self, rows: dict[str, tuple[int, Tensor]]) -> None:
        self._rows = rows

    def whole_tensor(self, name: str) -> Tensor:
        """Return a parameter that is not sharded."""
        return self._rows[name][1]

    def tensor_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a parameter.

        Raises:
            IndexError: The rows are in another process.
        """
        first, rows = self._rows[name]
        if not first <= start < stop <= first + len(rows):
            raise IndexError(f"the rows {start} to {stop} of {name} are in another process")
        return rows[start - first : stop - first]


def make_model_with_deferred_values(make_model: Callable[[], Any], device: torch.device) -> Any:
    """Make a model with random weights, without holding all of its weights.

    Args:
        make_model: Function that makes the model and seeds its random numbers.
        device: Device on which the weights will be.

    Returns:
        The model on the meta device. Its weights will be equal to those of ``make_model()``.
    """
    values = _InitialRowsRecorder(
        rank=distributed.get_rank(), world_size=distributed.get_world_size()
    )
    with init_empty_weights(include_buffers=False), values:
        model = make_model()
    model.tie_weights()  # within the context, a tied weight became two parameters
    rows = {name: values.rows_by_id[id(p)][1:] for name, p in model.named_parameters()}
    model.deferred_weights = DeferredWeights(_InitialRows(rows), device)
    return model


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers of a model, which are not deferred, to a device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
