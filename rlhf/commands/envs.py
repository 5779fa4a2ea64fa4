"""Implements `rlhf envs list`, `rlhf envs play` and `rlhf envs check`."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from rlhf.commands.tables import table_text
from rlhf.common.text import count_text
from rlhf.config.base import CommandConfig


@dataclass(frozen=True)
class EnvListConfig(CommandConfig):
    """Configuration of `rlhf envs list`."""

    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class EnvConfig(CommandConfig):
    """Configuration of `rlhf envs play` and `rlhf envs check`: an environment."""

    env: str
    """Gymnasium id, or module:name or file.py:name for an environment that the module registers or
    defines."""


def list_environments(config: EnvListConfig) -> Iterator[str]:
    """Yield the catalog of environments as a table or as JSON."""
    from rlhf.envs.catalog import catalog

    columns = ("id", "horizon", "optimum", "random", "source", "summary")
    rows = catalog()
    yield json.dumps(rows, indent=2) if config.json else table_text(rows, columns)


def play_environment(config: EnvConfig) -> Iterator[str]:
    """Run one episode that the user plays in the terminal; yield nothing."""
    from rlhf.envs.play import play

    play(config.env)
    yield from ()


def check_environment(config: EnvConfig) -> Generator[str, None, int]:
    """Check an environment; yield the findings and their number.

    Returns:
        2 if there are findings, otherwise 0.
    """
    from rlhf.envs.check import check

    findings = check(config.env)
    yield from map(str, findings)
    yield f"{config.env}: {count_text(len(findings), 'finding')}"
    return 2 if findings else 0
