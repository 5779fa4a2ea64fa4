"""Define commands of the command line, and the table of all commands.

Functions that run other commands, such as studies and pipelines, receive the table as an argument.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.common.foreign import exit_as_exception
from rlhf.common.imports import import_object
from rlhf.common.launcher import launcher_number
from rlhf.common.names import did_you_mean
from rlhf.common.registry import check_and_record_new_name
from rlhf.common.user_code import definition_location_text, guarded_call
from rlhf.config.base import TrainingConfig
from rlhf.config.load import ConfigSource, assemble_tree_and_load_plugins, build_config, merge_trees
from rlhf.errors import UserError
from rlhf.runs.alarms import Halt, log_halt_data_write_errors, write_alarm_description
from rlhf.runs.changes import Change, check_only_permitted_changes, find_and_check_changes
from rlhf.runs.claim import check_writable, path_without_dot_dot
from rlhf.runs.directory import Run
from rlhf.runs.renamed import upgraded_config
from rlhf.runs.trackers import check_trackers_installed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """A row of the table of commands.

    Classes and functions are named as ``module:name`` and imported when the command is used, so
    that `rlhf --help` imports no torch. The commands of plug-ins have the objects themselves.
    """

    name: str
    """One or two words, such as ``ppo`` or ``data check``."""
    summary: str
    """One-line description for the help."""
    config: str | type
    """The configuration class."""
    run: str | Callable[..., Any]
    """The function that runs the command.

    If `makes_run` is true, the function takes (name, config, run) and returns the path of its
    result, such as the trained model or the run directory. Otherwise the function takes the config
    and is a generator, which yields the text to print and may return the exit code."""
    plan: str = ""
    """The function for --dry-run, which takes (name, config) and returns the text to print. If this
    field is empty, a dry run checks only keys and types."""
    makes_run: bool = False
    """Whether the command writes a run directory."""
    arguments: tuple[str, ...] = ()
    """Configuration keys that positional arguments set, in order. The name ``config`` means that
    the arguments are config files, as with ``--config``."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Defaults that differ from those of the configuration class, as nested mappings."""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Configuration key with a mapping -> class that defines the keys of the mapping."""
    runs_commands: bool = False
    """Whether `run` and `plan` have an additional argument ``commands``, the table of commands."""
    read: str = ""
    """The function that builds the configuration from (sources, overrides, table of commands). If
    this field is empty, the configuration is built from the configuration class."""


class CommandTable(dict[str, Command]):
    """All commands by name, with methods that read configurations and run the commands.

    Args:
        groups: Heading in `rlhf --help` -> commands below this heading.
    """

    def __init__(self, groups: Mapping[str, Sequence[Command]]) -> None:
        super().__init__({row.name: row for rows in groups.values() for row in rows})
        self.groups = {heading: list(rows) for heading, rows in groups.items()}
        self.sources: dict[str, str] = {}
        """Name -> file or module of the code that added the command, for commands of plug-ins."""

    def add(self, command: Command, group: str, definition: Any) -> None:
        """Add the command of a plug-in, or replace the one that the same plug-in added.

        Args:
            command: The command.
            group: Heading in `rlhf --help`.
            definition: Function or class that the plug-in registers.

        Raises:
            UserError: Different code has a command of this name.
        """
        check_and_record_new_name("command", command.name, self, self.sources, definition)
        for rows in self.groups.values():
            rows[:] = [row for row in rows if row.name != command.name]
        self[command.name] = command
        self.groups.setdefault(group, []).append(command)

    @property
    def first_words(self) -> set[str]:
        """First words of the commands with two words."""
        return {name.split()[0] for name in self if " " in name}

    def __missing__(self, name: str) -> Command:
        family = [known for known in self if known.startswith(f"{name} ")]
        near = (
            f"; the commands are {', '.join(family)}" if family else did_you_mean(str(name), self)
        )
        raise UserError(f"unknown command {name!r}{near}; see rlhf --help")

    def read_config(
        self, name: str, sources: Sequence[ConfigSource], overrides: Sequence[tuple[str, Any]]
    ) -> Any:
        """Build the configuration of a command.

        Args:
            name: Name of the command.
            sources: YAML files and mappings; later ones take precedence.
            overrides: Dotted keys and their values, which take precedence over ``sources``.

        Raises:
            UserError: A file cannot be read, or a key or a value is invalid.
        """
        if name not in self:  # a plug-in of the configuration may define the command
            assemble_tree_and_load_plugins(sources, overrides)
        command = self[name]
        if command.read:
            return import_object(command.read)(sources, overrides, self)
        tree = upgrade_recorded_config(name, assemble_tree_and_load_plugins(sources, overrides))
        if name in self.sources:  # the plug-ins are loaded, and its own class need not have the key
            keys = {field.name for field in dataclasses.fields(import_object(command.config))}
            tree = {key: value for key, value in tree.items() if key != "plugins" or key in keys}
        paths = [source for source in sources if not isinstance(source, Mapping)]
        if paths and "stages" in tree:
            raise UserError(f"{paths[-1]} is a pipeline: run it with `rlhf run {paths[-1]}`")
        options = {field: import_object(path) for field, path in command.options.items()}
        return build_config(
            import_object(command.config), merge_trees(command.defaults, tree), options
        )

    def config_from_tree(self, name: str, tree: Mapping[str, Any]) -> Any:
        """Build the configuration of a command from plain data.

        Raises:
            UserError: A key or a value is invalid.
        """
        return self.read_config(name, [tree], [])

    def effective_config_tree(self, name: str, config: Any) -> dict[str, Any]:
        """Return a configuration as plain data, with exactly the settings that the run uses.

        The defaults of a trainer are added. The settings of an algorithm that have no effect are
        omitted. ``config.yaml`` therefore describes the run completely. If the command writes a run
        directory, the key ``command`` with its name is added.
        """
        tree = dataclasses.asdict(config)
        if name in ALGORITHMS:
            from rlhf.config.online import algorithm_of

            effective = algorithm_of(name, config).settings_with_effect
            tree["algorithm"] = {k: v for k, v in tree["algorithm"].items() if k in effective}
        if "trainer" in self[name].options:
            from rlhf.config.offline import trainer_defaults, trl_specific_defaults
            from rlhf.config.optimization import OPTIONS_BY_COMMAND

            defaults = {k: v for k, v in trainer_defaults(name).items() if v is not None}
            if name not in OPTIONS_BY_COMMAND:  # only TRL trains
                defaults |= trl_specific_defaults(import_object(self[name].options["trainer"]))
            tree["trainer"] = {**defaults, **tree["trainer"]}
        return {"command": name, **tree} if self[name].makes_run else tree

    def check_run_config_unchanged(self, name: str, tree: Mapping[str, Any]) -> None:
        """Check that the run in ``output_dir``, if there is one, has the same configuration.

        Raises:
            UserError: The run was started with another configuration or other inputs.
        """
        directory = Path(tree["output_dir"])
        if (directory / "config.yaml").exists():
            config = self.config_from_tree(name, tree)
            check_only_permitted_changes(directory, self.effective_config_tree(name, config))

    def changes_on_resume(self, name: str, tree: Mapping[str, Any]) -> tuple[Change, ...] | None:
        """Return the changes with which the run in ``output_dir`` would continue.

        Returns:
            The changes; None if there is no run.

        Raises:
            UserError: A change is not permitted.
        """
        directory = Path(tree["output_dir"])
        if not (directory / "config.yaml").exists():
            return None
        return find_and_check_changes(
            directory, self.effective_config_tree(name, self.config_from_tree(name, tree))
        )

    def plan(self, name: str, config: Any) -> str:
        """Return a description of what a command would do: data, steps, memory.

        Raises:
            UserError: The configuration or the data are invalid, or the output directory cannot be
                written.
        """
        if directory := getattr(config, "output_dir", None):
            check_writable(path_without_dot_dot(directory))
        path = self[name].plan
        return (
            self._import_function(name, path)(name, config) if path else "keys and types are valid"
        )

    def run_and_yield_text(self, name: str, config: Any) -> Generator[str, None, int]:
        """Run a command without a run directory; yield the text to print, return the exit code."""
        function = self._import_function(name, self[name].run)
        return (
            _output_of_plugin(name, function, config) if name in self.sources else function(config)
        )

    def run_command(self, name: str, tree: Mapping[str, Any]) -> Path:
        """Check a configuration, open its run directory, run the command and write the report.

        Returns:
            The path of the result: the folder of the trained model, the run directory or a page.

        Raises:
            UserError: The configuration or the data are invalid, or the directory cannot be used.
        """
        return self.run_command_with_config(name, self.config_from_tree(name, tree))

    def check_command_makes_run(self, name: str) -> None:
        """Check that a command writes a run directory.

        Raises:
            UserError: The command is not known, or writes no run directory.
        """
        if not self[name].makes_run:
            raise UserError(f"{name} writes no run: use it on the command line, as rlhf {name}")

    def run_command_with_config(self, name: str, config: Any) -> Path:
        """Run a command like `run_command`, with a configuration that is built already."""
        from rlhf.reports import write_report
        from rlhf.reports.run_page import REPORT_FILE

        self.check_command_makes_run(name)
        if isinstance(config, TrainingConfig) and launcher_number("WORLD_SIZE") > 1:
            # The processes join before one of them can fail, so that the others notice its end.
            from rlhf.training.distributed import init_distributed

            init_distributed()
        tree = self.effective_config_tree(name, config)
        check_trackers_installed(tree.get("track", ()))
        run = Run.open(tree)
        try:
            if run.finished:
                log.info("%s is finished: nothing to do", run.directory)
                result = run.final if run.final.exists() else run.directory
            else:
                (run.directory / REPORT_FILE).unlink(missing_ok=True)
                with exit_as_exception():  # an exit code of success would hide the unfinished run
                    result = self._import_function(name, self[name].run)(name, config, run)
                run.finish()
            if run.writes and not (run.directory / REPORT_FILE).exists():
                write_report(run.directory)
        except Halt as halt:
            if run.writes and halt.saved:
                with log_halt_data_write_errors(run.directory, halt):
                    write_alarm_description(run.directory, halt, run.config)
            if halt.repeatable:
                halt.args = (f"{halt} (repeat the check: rlhf replay {run.directory})",)
            raise
        except SystemExit as error:
            raise RuntimeError(
                f"code that {run.directory} uses called sys.exit({error.code!r})"
            ) from error
        finally:
            run.close()
        return result

    def _import_function(self, name: str, path: str | Callable[..., Any]) -> Callable[..., Any]:
        """Import a function of the command `name`; bind `commands` to this table if needed.

        Raises:
            UserError: The command runs other commands, and a launcher started several processes.
        """
        function = import_object(path)
        if not self[name].runs_commands:
            return function
        if launcher_number("WORLD_SIZE") > 1:
            raise UserError(
                f"`rlhf {name}` runs in one process: start it without torchrun, or start each "
                "training command with torchrun"
            )
        return functools.partial(function, commands=self)


def _output_of_plugin(
    name: str, function: Callable[..., Any], config: Any
) -> Generator[str, None, int]:
    """Run a command of a plug-in without a run directory; see `run_and_yield_text`.

    Raises:
        UserError: The function is not a generator of texts, or returns something else than an
            integer or nothing.
    """
    what = f"command {name!r}"
    advice = (
        "write it as a generator: yield each text to print, and return the exit code or nothing"
    )
    with guarded_call(function, what=what):
        output = function(config)
    problem, code = "", None
    while isinstance(output, Iterator):
        try:
            with guarded_call(function, what=what):
                text: Any = next(output)
        except StopIteration as end:
            code = end.value
            break
        if not isinstance(text, str):
            problem = f"yielded a {type(text).__name__}"
            break
        yield text
    else:
        problem = f"returned a {type(output).__name__}"
    if code is not None and not isinstance(code, int):
        problem = f"returned a {type(code).__name__}"
    if problem:
        raise UserError(f"{what}{definition_location_text(function)} {problem}: {advice}")
    return code or 0


def upgrade_recorded_config(name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the recorded configuration of a run to a configuration of the current version.

    The ``config.yaml`` of a run contains the command, which is removed. It may contain keys of an
    older version, which are renamed. A configuration without a command is returned unchanged.

    Raises:
        UserError: A different command than ``name`` recorded the configuration.
    """
    if "command" not in tree and "verb" not in tree:
        return dict(tree)
    config = upgraded_config(tree)
    recorded = config.pop("command")
    if recorded != name:
        raise UserError(f"the configuration is for `rlhf {recorded}`, not for `rlhf {name}`")
    return config
