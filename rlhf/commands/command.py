"""A command of the command line: its configuration, the function that does its work, its dry run.

The table of all commands is `rlhf.cli.table`. Functions that run other commands, such as studies
and pipelines, receive it as an argument.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.common.imports import import_object
from rlhf.common.names import nearest
from rlhf.config.load import as_tree, assemble, build, merge
from rlhf.errors import UserError
from rlhf.runs.directory import Run
from rlhf.runs.renamed import current_config

log = logging.getLogger(__name__)

Overrides = Sequence[tuple[str, Any]]
"""Dotted keys and their values."""


@dataclass(frozen=True)
class Command:
    """A row of the table of commands.

    Classes and functions are named as ``module:name`` and imported when the command is used, so
    that `rlhf --help` imports no torch.
    """

    group: str
    """Heading in `rlhf --help`."""
    name: str
    """One or two words, such as ``ppo`` or ``data check``."""
    summary: str
    """One line for the help."""
    config: str
    """The configuration class."""
    run: str
    """The function that does the work.

    With a run directory, it takes (name, config, run) and returns the path of what it wrote.
    Otherwise it takes the config and is a generator of the text to print; a generator that returns
    a value returns the exit code."""
    plan: str = ""
    """The function of --dry-run. It takes (name, config) and returns text. Without one, a dry run
    checks keys and types."""
    makes_run: bool = False
    """Whether the command makes a run directory."""
    arguments: tuple[str, ...] = ()
    """Keys that positional arguments set, in order; ``config`` stands for --config FILE."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys whose default differs from that of the configuration class, as nested mappings."""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Key of the configuration whose mapping another class checks -> that class."""
    runs_commands: bool = False
    """Whether `run` and `plan` take the table of commands as their last argument."""
    read: str = ""
    """Builds the configuration from (files, overrides, table of commands), where the class alone
    does not describe it."""


class CommandTable(Mapping[str, Command]):
    """All commands by name, and what can be done with one of them."""

    def __init__(self, commands: Iterable[Command]) -> None:
        self._commands = {command.name: command for command in commands}

    def __getitem__(self, name: str) -> Command:
        return self._commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._commands)

    def __len__(self) -> int:
        return len(self._commands)

    def find(self, name: str) -> Command:
        """Return the command of that name.

        Raises:
            UserError: There is none; the message names the nearest one.
        """
        if name not in self:
            raise UserError(f"unknown command {name!r}{nearest(name, self)}; see rlhf --help")
        return self[name]

    def read(self, name: str, files: Sequence[str | Path], overrides: Overrides) -> Any:
        """Build a command's configuration from files and overrides; later ones win.

        Raises:
            UserError: A file cannot be read, or a key or a value is wrong.
        """
        command = self.find(name)
        if command.read:
            return import_object(command.read)(files, overrides, self)
        tree = self.from_record(name, assemble(files, overrides))
        if "stages" in tree:
            raise UserError(f"{files[-1]} is a pipeline: start it with `rlhf run {files[-1]}`")
        return self.configure(name, tree)

    def configure(self, name: str, tree: Mapping[str, Any]) -> Any:
        """Build a command's configuration from plain data.

        Raises:
            UserError: A key or a value is wrong.
        """
        command = self.find(name)
        options = {field: import_object(path) for field, path in command.options.items()}
        return build(import_object(command.config), merge(command.defaults, tree), options)

    def from_record(self, name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return a configuration without what only the record of a run has.

        The ``config.yaml`` of a run names its command and may have keys of an older version.

        Raises:
            UserError: The record is one of another command.
        """
        if "command" not in tree and "verb" not in tree:
            return dict(tree)
        config = current_config(tree)
        recorded = config.pop("command")
        if recorded != name:
            raise UserError(f"the configuration is one of `rlhf {recorded}`, not of `rlhf {name}`")
        return config

    def settings_in_force(self, name: str, config: Any) -> dict[str, Any]:
        """Return a configuration as plain data, with every setting that the run uses.

        The defaults of a trainer are added and an algorithm's settings without effect are left out,
        so that ``config.yaml`` states what was trained.
        """
        tree = as_tree(config)
        if name in ALGORITHMS:
            from rlhf.config.online import algorithm_of

            effective = algorithm_of(name, config).effective
            tree["algorithm"] = {k: v for k, v in tree["algorithm"].items() if k in effective}
        if "trainer" in self[name].options:
            from rlhf.config.offline import trainer_defaults

            defaults = {k: v for k, v in trainer_defaults(name).items() if v is not None}
            tree["trainer"] = {**defaults, **tree["trainer"]}
        return {"command": name, **tree} if self[name].makes_run else tree

    def plan(self, name: str, config: Any) -> str:
        """Return what a command would do: data, steps, memory. Trains nothing.

        Raises:
            UserError: The run would refuse the configuration.
        """
        command = self[name]
        if not command.plan:
            return "keys and types are right"
        return self._call(command, command.plan, name, config)

    def output(self, name: str, config: Any) -> Generator[str, None, int]:
        """Do the work of a command without a run directory; yield the text to print."""
        return self._call(self[name], self[name].run, config)

    def run_command(self, name: str, tree: Mapping[str, Any]) -> Path:
        """Check a configuration, open its run directory, do the work and write the report.

        Args:
            name: A command that makes a run directory.
            tree: Its configuration as plain data.

        Returns:
            The model's folder, or the run directory of a command that trains none.

        Raises:
            UserError: The configuration, the data or the directory cannot be used.
        """
        return self.run_config(name, self.configure(name, tree))

    def run_config(self, name: str, config: Any) -> Path:
        """Do what `run_command` does with a configuration that is already built."""
        from rlhf.reports import write_report

        command = self[name]
        run = Run.open(self.settings_in_force(name, config))
        if run.finished:
            log.info("%s is finished: nothing to do", run.directory)
            return run.final if run.final.exists() else run.directory
        try:
            result = self._call(command, command.run, name, config, run)
        except (ValueError, OSError, KeyboardInterrupt):  # a UserError is a ValueError
            run.discard_if_unused()
            raise
        run.finish()
        if run.writes:
            write_report(run.directory)
        return result

    def _call(self, command: Command, function: str, *arguments: Any) -> Any:
        extra = (self,) if command.runs_commands else ()
        return import_object(function)(*arguments, *extra)
