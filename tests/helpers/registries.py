"""Restore the tables of algorithms, rewards and other parts after a test that adds to them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import gymnasium as gym

from rlhf.algorithms import components
from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.table import COMMANDS
from rlhf.common import plugins
from rlhf.common.registry import Registry
from rlhf.config.engine import ENGINES
from rlhf.config.optimization import OPTIMIZERS
from rlhf.config.reward import MODEL_KINDS
from rlhf.data.schemas import SCHEMAS
from rlhf.envs.registration import ENVIRONMENTS
from rlhf.reward_models.registry import KINDS
from rlhf.runs.callbacks import CALLBACKS
from rlhf.runs.trackers import TRACKERS

REGISTRIES: tuple[Registry[Any], ...] = (
    ALGORITHMS,
    CALLBACKS,
    ENGINES,
    ENVIRONMENTS,
    KINDS,
    MODEL_KINDS,
    OPTIMIZERS,
    SCHEMAS,
    TRACKERS,
)


@contextlib.contextmanager
def restored_registries() -> Iterator[None]:
    """Return a context manager that removes what plug-ins add, and forgets the plug-ins.

    The entries of the toolkit stay as they are, because the import of a module replaces them.
    """
    tables = [*REGISTRIES, *map(components.registered_components, ("advantages", "losses", "kl"))]
    before = [(dict(table), dict(table.sources)) for table in tables]
    commands = dict(COMMANDS), dict(COMMANDS.sources)
    groups = {heading: list(rows) for heading, rows in COMMANDS.groups.items()}
    path, modules, files = list(sys.path), set(sys.modules), set(plugins._user_files)
    loaded, installed = dict(plugins._loaded_files), dict(plugins._installed_plugins)
    variable = os.environ.get("RLHF_PLUGINS")
    try:
        yield
    finally:
        for env_id in ENVIRONMENTS.keys() - before[REGISTRIES.index(ENVIRONMENTS)][0].keys():
            gym.registry.pop(env_id, None)
        for table, (entries, sources) in zip(tables, before, strict=True):
            for name in table.sources.keys() | sources.keys():
                table.pop(name, None)
                if name in entries:
                    table[name] = entries[name]
            _restore(table.sources, sources)
        _restore(COMMANDS, commands[0])
        _restore(COMMANDS.sources, commands[1])
        _restore(COMMANDS.groups, groups)
        added = {file.module.__name__ for file in plugins._loaded_files.values()} - modules
        for name in added:
            sys.modules.pop(name, None)
        _restore(plugins._loaded_files, loaded)
        _restore(plugins._installed_plugins, installed)
        sys.path[:] = path
        plugins._user_files.intersection_update(files)
        os.environ.pop("RLHF_PLUGINS", None)
        if variable is not None:
            os.environ["RLHF_PLUGINS"] = variable


def _restore(dictionary: dict[Any, Any], content: dict[Any, Any]) -> None:
    if dictionary != content:
        dictionary.clear()
        dictionary.update(content)
