"""Implements `rlhf algorithms`, which lists all online algorithms or prints one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf.commands.tables import table_text
from rlhf.common.names import did_you_mean
from rlhf.config.base import CommandConfig
from rlhf.errors import UserError


@dataclass(frozen=True)
class AlgorithmsConfig(CommandConfig):
    """Configuration of `rlhf algorithms`."""

    name: str | None = None
    """Algorithm to print with its equation and settings. By default, a table of all algorithms is
    printed."""
    json: bool = False
    """Print all algorithms as JSON instead of a table."""


def list_algorithms(config: AlgorithmsConfig) -> Iterator[str]:
    """Yield the text to print: one algorithm, JSON, or the table of all algorithms.

    Raises:
        UserError: There is no algorithm of the given name.
    """
    from rlhf.algorithms.registry import algorithm_table

    rows = algorithm_table()
    if config.name is not None:
        by_name = {row["name"]: row for row in rows}
        if config.name not in by_name:
            raise UserError(
                f"algorithms: unknown algorithm {config.name!r}{did_you_mean(config.name, by_name)}"
            )
        row = by_name[config.name]
        width = max(map(len, row))
        yield "\n".join(f"{key:>{width}}: {value}" for key, value in row.items())
    elif config.json:
        yield json.dumps(rows, indent=2)
    else:
        columns = ("name", "critic", "unbiased", "summary", "paper")
        added = any(row["source"] for row in rows)
        shown = [row | {"source": Path(row["source"]).name} for row in rows]
        yield table_text(shown, (*columns, "source") if added else columns)
