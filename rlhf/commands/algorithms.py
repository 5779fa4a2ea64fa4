"""`rlhf algorithms`: list the online algorithms, or print one with its settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.commands.tables import table_text
from rlhf.common.names import nearest
from rlhf.errors import UserError


@dataclass(frozen=True)
class AlgorithmsConfig:
    """Configuration of `rlhf algorithms`."""

    name: str | None = None
    """The algorithm to print with its equation and settings; None: a table of all algorithms."""
    json: bool = False
    """Print all algorithms as JSON instead of a table."""


def algorithms(config: AlgorithmsConfig) -> Iterator[str]:
    """Yield the table of algorithms, or one of them."""
    from rlhf.algorithms.registry import table

    rows = table()
    if config.name is not None:
        by_name = {row["name"]: row for row in rows}
        if config.name not in by_name:
            raise UserError(
                f"algorithms: there is no {config.name!r}{nearest(config.name, by_name)}"
            )
        yield "\n".join(f"{key:>12}: {value}" for key, value in by_name[config.name].items())
    elif config.json:
        yield json.dumps(rows, indent=2)
    else:
        yield table_text(rows, ("name", "critic", "unbiased", "summary", "paper"))
