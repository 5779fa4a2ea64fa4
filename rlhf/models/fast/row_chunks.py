"""Rows that go through a chain of operations together."""

from __future__ import annotations

from torch import Tensor


def row_chunks(table: Tensor, numbers: int) -> list[slice]:
    """Slices of the rows of [N, D] that hold at most ``numbers`` numbers; all on an accelerator.

    On a CPU they then stay in a core's cache from one operation to the next.
    """
    size = max(1, len(table) if table.device.type != "cpu" else numbers // table.shape[1])
    return [slice(start, start + size) for start in range(0, len(table), size)]
