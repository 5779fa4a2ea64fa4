"""Data-parallel training: micro-batches are sharded over processes, gradients are summed.

The processes are started by ``torchrun`` or ``accelerate launch``; without a launcher the world has
size 1 and communicates nothing. Every process holds the whole batch of rollouts, so baselines,
whitening and denominators are those of the global batch. Only forward and backward passes are
sharded. The model itself is replicated.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The group of processes that train together."""

    rank: int = 0
    size: int = 1

    def map(
        self, items: Sequence[Item], function: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        """Return ``function(items)``; each process computes it on a contiguous part of the items.

        Every process gets all results, in the order of the items. The function may return fewer
        results than items.
        """
        if self.size == 1:
            return function(items)
        bounds = [len(items) * rank // self.size for rank in range(self.size + 1)]
        shard = items[bounds[self.rank] : bounds[self.rank + 1]]
        results = function(shard) if shard else []
        return [result for rank_results in self.gather(results) for result in rank_results]

    def shard(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return every ``size``-th item, starting at this process's rank."""
        return items[self.rank :: self.size]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every process has called this method."""
        if self.size > 1:
            distributed.barrier()

    def all_reduce(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def all_reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over the processes; the gradient of an unused parameter counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


def init_distributed() -> World:
    """Initialize the process group that the launcher's environment variables describe."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        # At interpreter shutdown it is too late: the group's threads sometimes abort the process.
        atexit.register(distributed.destroy_process_group)
    return World(distributed.get_rank(), size)
