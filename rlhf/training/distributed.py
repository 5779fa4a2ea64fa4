"""Several processes as one: work is shared out, results and gradients come together.

Started by ``torchrun`` or ``accelerate launch``; alone, a world of one does nothing. Every process
holds the whole batch of rollouts, so baselines, whitening and denominators are those of the global
batch; the forward and backward passes are shared out by micro-batch, and gradients are added.
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
    """This process among its peers."""

    rank: int = 0
    size: int = 1

    def map(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        """``work(items)``, each process doing a contiguous share; every process gets all results.

        ``work`` may return fewer results than items; their order stays.
        """
        if self.size == 1:
            return work(items)
        cuts = [len(items) * part // self.size for part in range(self.size + 1)]
        share = items[cuts[self.rank] : cuts[self.rank + 1]]
        mine = work(share) if share else []
        return [result for part in self.gather(mine) for result in part]

    def mine(self, parts: Sequence[Item]) -> Sequence[Item]:
        """The parts that this process does."""
        return parts[self.rank :: self.size]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over the processes; a parameter that met no micro-batch counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


def join() -> World:
    """The world that the launcher's environment describes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        # Left to the interpreter's own end, the group's threads now and then abort the process.
        atexit.register(distributed.destroy_process_group)
    return World(distributed.get_rank(), size)
