"""Generate the text of `rlhf --help` and `rlhf COMMAND --help` from the table of commands."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.arguments import Arguments
from rlhf.commands.command import Command, CommandTable, upgrade_recorded_config
from rlhf.common.imports import import_object
from rlhf.config.help import help_text
from rlhf.config.load import assemble_tree_and_load_plugins
from rlhf.config.online import algorithm_with_settings
from rlhf.runs.directory import flatten_keys

USAGE = """\
usage: rlhf COMMAND [--config FILE ...] [--key value ...]

{commands}

Options of every command
  --config FILE          YAML file of options; repeatable, later files take precedence
  --key.sub value        override an option; `rlhf COMMAND --help` lists the options
  --plugins FILE.py      also load the algorithms, rewards and commands of a file or module
  --print-config         check the configuration, print it and stop
  --dry-run              check without running; for training, also estimate memory and time
  --debug                print the traceback of an error
"""


def program_help(commands: CommandTable) -> str:
    """Return the help of the program, which lists every command under the heading of its group."""
    blocks = ["\n".join([group, *_command_lines(rows)]) for group, rows in commands.groups.items()]
    return USAGE.format(commands="\n\n".join(blocks))


def group_help(commands: CommandTable, word: str) -> str:
    """Return the help of all two-word commands whose first word is ``word``."""
    rows = [command for name, command in commands.items() if name.startswith(f"{word} ")]
    return "\n".join([f"usage: rlhf {word} COMMAND", "", *_command_lines(rows)])


def _command_lines(commands: Sequence[Command]) -> list[str]:
    """Return a line with the call and the summary of each command."""
    calls = [_call_syntax(command) for command in commands]
    width = max(22, *map(len, calls))
    return [f"  {call:<{width}} {row.summary}" for call, row in zip(calls, commands, strict=True)]


def _call_syntax(command: Command) -> str:
    """Return the name of a command followed by its positional arguments, for a usage line."""
    names = ["FILE.yaml" if name == "config" else name.upper() for name in command.arguments]
    return " ".join([command.name, *names])


def command_help(command: Command, arguments: Arguments) -> str:
    """Return the help of a command, which lists the keys that have an effect and their defaults.

    Args:
        command: The command.
        arguments: Arguments on the command line besides ``--help``. With ``engine: trl``, the
            options of TRL are listed. The given settings of an algorithm determine which of its
            other settings have an effect and are listed.
    """
    options = {field: import_object(path) for field, path in command.options.items()}
    defaults = flatten_keys(command.defaults)
    hidden: set[str] = set()
    notes: list[str] = []
    tree: dict[str, Any] = {}
    if options or command.name in ALGORITHMS:
        tree = upgrade_recorded_config(
            command.name, assemble_tree_and_load_plugins(arguments.files, arguments.overrides)
        )
    if command.name in ALGORITHMS:
        defaults, hidden = _algorithm_values_and_hidden_keys(
            command.name, tree.get("algorithm", {})
        )
        notes = [
            "Settings that have no effect with these values are not listed; "
            f"`rlhf {command.name} --algorithm.num_minibatches 4 --help` also lists those that "
            "need several optimizer steps per batch."
        ]
    elif options:
        show_trl = tree.get("engine") == "trl"
        defaults, hidden = _trainer_defaults_and_hidden_keys(
            command.name, options, show_trl=show_trl
        )
        if not show_trl:
            notes = [f"`rlhf {command.name} --engine trl --help` lists every option of TRL."]
    cls = import_object(command.config)
    if command.read:
        notes.append(inspect.getdoc(cls) or "")
    return help_text(
        cls,
        command=f"rlhf {command.name}",
        arguments=_call_syntax(command).removeprefix(command.name).strip(),
        summary=command.summary,
        option_classes=options,
        defaults=defaults,
        hidden_keys=hidden,
        notes=notes,
    )


def _algorithm_values_and_hidden_keys(
    name: str, settings: dict[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """Return dotted key -> value for an algorithm's settings, and the keys that have no effect."""
    algorithm = algorithm_with_settings(name, settings)
    values = dataclasses.asdict(algorithm.settings)
    hidden = {f"algorithm.{key}" for key in values if key not in algorithm.settings_with_effect}
    hidden |= set() if algorithm.needs_critic else {"critic", "critic_warmup_steps"}
    return {f"algorithm.{key}": value for key, value in values.items()}, hidden


def _trainer_defaults_and_hidden_keys(
    name: str, options: dict[str, type], *, show_trl: bool
) -> tuple[dict[str, Any], set[str]]:
    """Return dotted key -> default for the trainer's options, and the options to omit in the help.

    If ``show_trl`` is true, the help lists the options of TRL. Otherwise it lists the options of
    the native engine, whose class replaces ``options["trainer"]`` in place. For a method that only
    TRL implements, it lists the options of TRL without the options of transformers that the native
    engine lacks.
    """
    from transformers import TrainingArguments

    from rlhf.config.offline import RESERVED_OPTIONS, trainer_defaults
    from rlhf.config.optimization import OPTIONS_BY_COMMAND, NativeOptions

    hidden = set(RESERVED_OPTIONS)
    if not show_trl and name in OPTIONS_BY_COMMAND:
        options["trainer"] = OPTIONS_BY_COMMAND[name]
    elif not show_trl:
        shared = {field.name for field in dataclasses.fields(NativeOptions)}
        hidden |= {field.name for field in dataclasses.fields(TrainingArguments)} - shared
    defaults = {f"trainer.{key}": value for key, value in trainer_defaults(name).items()}
    return defaults, {f"trainer.{key}" for key in hidden}
