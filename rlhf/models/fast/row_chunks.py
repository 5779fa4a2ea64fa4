"""Split a tensor into chunks of rows, so that a chain of operations is applied to one chunk."""

from __future__ import annotations

from torch import Tensor


def row_chunks(table: Tensor, max_elements: int) -> list[slice]:
    """Return slices of the rows of a tensor [N, D], each with at most ``max_elements`` elements.

    On a CPU, such a slice stays in a core's cache from one operation to the next. A slice has at
    least one row. On an accelerator, there is only one slice.
    """
    size = max(1, len(table) if table.device.type != "cpu" else max_elements // table.shape[1])
    return [slice(start, start + size) for start in range(0, len(table), size)]
