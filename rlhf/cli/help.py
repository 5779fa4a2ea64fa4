"""Generate the text of `rlhf --help` and `rlhf COMMAND --help` from the table of commands."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.arguments import Arguments
from rlhf.commands.command import Command, CommandTable, current_tree
from rlhf.common.imports import import_object
from rlhf.config.help import help_text
from rlhf.config.load import assemble
from rlhf.config.online import with_settings

USAGE = """\
usage: rlhf COMMAND [--config FILE ...] [--key value ...]

{commands}

Options of every command
  --config FILE          YAML file of options; repeatable, later files win
  --key.sub value        override one option; `rlhf COMMAND --help` lists them
  --print-config         print the checked configuration and stop
  --dry-run              check everything, print batch sizes and memory, train nothing
  --debug                print the traceback of an error
"""


def usage(commands: CommandTable) -> str:
    """Return the help of the program: every command under the heading of its group."""
    blocks = ["\n".join([group, *_lines(rows)]) for group, rows in commands.groups.items()]
    return USAGE.format(commands="\n\n".join(blocks))


def group_help(commands: CommandTable, word: str) -> str:
    """Return the help of all commands whose name begins with `word`."""
    rows = [command for name, command in commands.items() if name.startswith(f"{word} ")]
    return "\n".join([f"usage: rlhf {word} COMMAND", "", *_lines(rows)])


def _lines(rows: Sequence[Command]) -> list[str]:
    calls = [_call(command) for command in rows]
    width = max(22, *map(len, calls))
    return [f"  {call:<{width}} {row.summary}" for call, row in zip(calls, rows, strict=True)]


def _call(command: Command) -> str:
    """Return the name of a command followed by the names of its arguments."""
    names = ["FILE.yaml" if name == "config" else name.upper() for name in command.arguments]
    return " ".join([command.name, *names])


def command_help(command: Command, arguments: Arguments) -> str:
    """Return the help of a command: the keys that have an effect, with their effective defaults.

    Args:
        command: A row of the table.
        arguments: Keys that are passed together with ``--help``. With ``engine: trl``, the options
        of TRL are listed. Settings of an algorithm determine which other settings have an effect.
    """
    options = {field: import_object(path) for field, path in command.options.items()}
    defaults: dict[str, Any] = {}
    hidden: set[str] = set()
    notes: list[str] = []
    tree: dict[str, Any] = {}
    if options or command.name in ALGORITHMS:
        tree = current_tree(command.name, assemble(arguments.files, arguments.overrides))
    if command.name in ALGORITHMS:
        defaults, hidden = _algorithm_help(command.name, tree.get("algorithm", {}))
        notes = [
            "Settings that have no effect with these values are left out; "
            f"`rlhf {command.name} --algorithm.num_minibatches 4 --help` shows those of "
            "several optimizer steps."
        ]
    elif options:
        show_trl = tree.get("engine") == "trl"
        defaults, hidden = _trainer_help(command.name, options, show_trl=show_trl)
        if not show_trl:
            notes = [f"`rlhf {command.name} --engine trl --help` lists every option of TRL."]
    cls = import_object(command.config)
    if command.read:
        notes.append(inspect.getdoc(cls) or "")
    return help_text(
        cls,
        command=f"rlhf {command.name}",
        arguments=_call(command).removeprefix(command.name).strip(),
        summary=command.summary,
        options=options,
        defaults=defaults,
        hidden=hidden,
        notes=notes,
    )


def _algorithm_help(name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return the values of an algorithm's settings, and the keys without effect."""
    algorithm = with_settings(name, settings)
    values = dataclasses.asdict(algorithm.settings)
    hidden = {f"algorithm.{key}" for key in values if key not in algorithm.effective_settings}
    hidden |= set() if algorithm.critic else {"critic", "critic_warmup_steps"}
    return {f"algorithm.{key}": value for key, value in values.items()}, hidden


def _trainer_help(
    name: str, options: dict[str, type], *, show_trl: bool
) -> tuple[dict[str, Any], set[str]]:
    """Return the values of the trainer's options, and the options that the help omits.

    Without ``show_trl`` the options are those of the native engine.
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
