"""Writing files in one of several processes that hold the parts of a sharded model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import distributed, nn

from rlhf.common.files import atomic_path
from rlhf.models.sharding.tensors import is_sharded


def has_sharded_parameters(model: nn.Module) -> bool:
    """Return whether FSDP shards at least one parameter of a model."""
    return any(map(is_sharded, model.parameters()))


def this_process_writes(model: nn.Module) -> bool:
    """Return whether this process writes the files when a model is saved.

    Every process takes part when a sharded model is saved, and the first one writes the files.
    """
    return not has_sharded_parameters(model) or distributed.get_rank() == 0


def value_of_first_process(value: Any) -> Any:
    """Return the value in the first process. Every process must call this function."""
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextlib.contextmanager
def shared_atomic_path(target: Path) -> Iterator[Path]:
    """Return a context manager like `atomic_path` for a path to which every process writes.

    All processes must enter it, and must see the same file system. The first process replaces the
    target after all processes have left the block.
    """
    with contextlib.ExitStack() as stack:
        first = distributed.get_rank() == 0
        partial = stack.enter_context(atomic_path(target)) if first else None
        yield value_of_first_process(partial)
        distributed.barrier()
