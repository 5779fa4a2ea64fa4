"""Access of the Python functions to the table of commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlhf.api.options import Config
from rlhf.common.guards import is_mapping, is_path, is_sequence
from rlhf.common.plugins import load_installed_plugins
from rlhf.config.load import ConfigSource
from rlhf.errors import UserError
from rlhf.runs.launch import prepare_process

if TYPE_CHECKING:
    from rlhf.commands.command import CommandTable


def load_command_table() -> CommandTable:
    """Return the table of commands, with those of installed plug-ins.

    Process settings that must precede the import of torch are applied first.
    """
    prepare_process()
    from rlhf.cli.table import COMMANDS

    load_installed_plugins()
    return COMMANDS


def as_config_sources(config: Config | Sequence[Config] | None) -> list[ConfigSource]:
    """Return a configuration, or several of them, as a list of mappings and paths; [] for None.

    Raises:
        UserError: A configuration is neither a mapping nor a path.
    """
    if config is None:
        return []
    several = config if is_sequence(config) else [config]
    for item in several:
        if not is_mapping(item) and not is_path(item):
            raise UserError(
                "config: expected a mapping, the path of a YAML file, or a list of these, got "
                f"{type(item).__name__}; the other arguments have names, such as model=..."
            )
    return [item if isinstance(item, Mapping) else str(item) for item in several]
