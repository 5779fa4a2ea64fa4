"""Access to sharded tensors: the rows of this process, and whole tensors gathered one at a time.

FSDP2 shards a parameter by rows: with N processes, each process holds ``ceil(rows / N)``
consecutive rows, and the last processes may hold fewer or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
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
    """The parameters of a loaded model."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())

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
def copy_rows(target: Tensor, source: RowSource, name: str) -> None:
    """Copy the rows of this process from the tensor ``name`` of a source to ``target``.

    If ``target`` is not sharded, all rows are copied.
    """
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
