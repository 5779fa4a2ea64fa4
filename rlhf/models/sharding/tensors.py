"""Access to sharded tensors: the rows of this process, and whole tensors gathered one at a time.

FSDP2 shards a parameter by rows: with N processes, each process holds ``ceil(rows / N)``
consecutive rows, and the last processes may hold fewer or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor


class RowSource(Protocol):
    """Named tensors of which single rows can be read."""

    def whole_tensor(self, name: str) -> Tensor:
        """Return a whole tensor."""
        ...

    def tensor_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a tensor."""
        ...


class StoredWeights:
    """The tensors in the safetensors files of a model folder.

    Args:
        folder: The folder.
        pattern: Glob pattern of the files.
    """

    def __init__(self, folder: str | Path, pattern: str = "model*.safetensors") -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(Path(folder).glob(pattern)):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self._paths[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def whole_tensor(self, name: str) -> Tensor:
        """Return a whole tensor."""
        with safe_open(self._paths[name], "pt") as file:
            return file.get_tensor(name)

    def tensor_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a tensor. Only these rows are read."""
        with safe_open(self._paths[name], "pt") as file:
            return file.get_slice(name)[start:stop]


class LoadedWeights:
    """The parameters of a model of Transformers, loaded from a folder.

    Args:
        folder: The folder.
        model_class: Class of the model.
        dtype: Dtype of the loaded parameters.
    """

    def __init__(self, folder: str | Path, model_class: Any, dtype: torch.dtype) -> None:
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        self.folder = folder
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        # Transformers initializes missing parameters randomly.
        stored = self._parameters.keys() - set(info["missing_keys"])
        self.shapes = {name: tuple(self._parameters[name].shape) for name in stored}

    def whole_tensor(self, name: str) -> Tensor:
        """Return a parameter."""
        return self._parameters[name]

    def tensor_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a parameter."""
        return self._parameters[name][start:stop]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether FSDP shards a tensor."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """Return the rows of a sharded tensor in this process; other tensors are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def tensor_from_local_rows(parameter: Tensor, rows: Tensor) -> Tensor:
    """Return ``rows`` as the rows of this process in a tensor that is sharded like ``parameter``.

    If ``parameter`` is not sharded, ``rows`` are the whole tensor and are returned unchanged.
    """
    if not isinstance(parameter, DTensor):
        return rows
    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@torch.no_grad()
def gather_whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor. For a sharded tensor, every process must call this function."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def row_range(num_rows: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """Return the first row of a process and the row after its last row."""
    height = -(-num_rows // world_size)
    return min(rank * height, num_rows), min((rank + 1) * height, num_rows)


@torch.no_grad()
def copy_rows(target: Tensor, source: StoredWeights | LoadedWeights, name: str) -> None:
    """Copy the rows of this process from the tensor ``name`` of a source to ``target``.

    If ``target`` is not sharded, all rows are copied.

    Raises:
        ValueError: The source has no such tensor, or it has another shape than ``target``.
    """
    shape, needed = source.shapes.get(name), tuple(target.shape)
    if shape != needed:
        problem = "is missing" if shape is None else f"has the shape {list(shape)}"
        raise ValueError(
            f"{source.folder} does not fit the model: the weight {name} {problem}, and the model "
            f"needs the shape {list(needed)}"
        )
    if not isinstance(target, DTensor):
        target.copy_(source.whole_tensor(name))
        return
    mesh = target.device_mesh
    start, stop = row_range(len(target), rank=mesh.get_local_rank(), world_size=mesh.size())
    if stop > start:
        target.to_local().copy_(source.tensor_rows(name, start, stop))


class WholeTensors(Mapping[str, Tensor]):
    """Mapping of names to whole tensors, each of which is gathered when it is read.

    Reading a sharded tensor is a collective operation, so every process must read the same names in
    the same order. The mapping keeps no whole tensor. A tensor with several names, such as a tied
    weight, has only its first name in the mapping.

    Args:
        tensors: Name -> sharded or other tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        known: set[int] = set()
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in known:
                known.add(id(tensor))
                self._tensors[name] = tensor

    def __getitem__(self, name: str) -> Tensor:
        return gather_whole(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without gathering it."""
        return self._tensors[name].dtype

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a whole tensor without gathering it."""
        return self._tensors[name].shape
