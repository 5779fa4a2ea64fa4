"""Access of the Python functions to the table of commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

from rlhf.api.options import Config
from rlhf.common.plugins import load_installed_plugins
from rlhf.config.load import Source
from rlhf.runs.launch import prepare_process

if TYPE_CHECKING:
    from rlhf.commands.command import CommandTable


def command_table() -> CommandTable:
    """Return the table of commands, after applying process settings that must precede torch."""
    prepare_process()
    from rlhf.cli.table import COMMANDS

    load_installed_plugins()
    return COMMANDS


def as_sources(config: Config | Sequence[Config] | None) -> list[Source]:
    """Return a configuration, or several of them, as a list of mappings and paths."""
    if config is None:
        return []
    several = [config] if isinstance(config, Mapping | str | PathLike) else config
    return [item if isinstance(item, Mapping) else str(item) for item in several]
