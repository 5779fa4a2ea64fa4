"""Implements `rlhf completion`, which prints a script that completes commands and keys in a shell.

The script is generated from the table of commands and the typed configurations. It completes
without starting Python. If a shell loads it with ``source <(rlhf completion bash)``, it is
generated again in each new shell, so it agrees with the installed version.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Literal

from rlhf.commands.command import Command, CommandTable
from rlhf.common.imports import import_object
from rlhf.config.base import CommandConfig
from rlhf.config.help import ConfigKey, sections_of
from rlhf.config.optimization import OPTIONS_BY_COMMAND, NativeOptions

COMMON_OPTIONS = {
    "config": "YAML file of options",
    "plugins": "file or module of a plug-in",
    "print-config": "check the configuration, print it and stop",
    "dry-run": "check without running; for training, also estimate memory and time",
    "debug": "print the traceback of an error",
    "help": "list the options",
}
"""Options of every command."""


@dataclass(frozen=True)
class ShellCompletionConfig(CommandConfig):
    """Configuration of `rlhf completion`."""

    shell: Literal["bash", "zsh", "fish"]
    """Shell that reads the script: bash, zsh or fish."""


@dataclass(frozen=True)
class _CommandsWithSameKeys:
    """Commands that have the same configuration keys."""

    commands: list[str]
    keys: dict[str, ConfigKey]
    """Name -> key."""


def shell_completion_script(config: ShellCompletionConfig, commands: CommandTable) -> Iterator[str]:
    """Yield the script for a shell."""
    key_sets = _group_commands_by_keys(commands)
    if config.shell == "fish":
        yield _fish_script(commands, key_sets)
    else:
        yield _bash_script(commands, key_sets, zsh=config.shell == "zsh")


def _group_commands_by_keys(commands: CommandTable) -> list[_CommandsWithSameKeys]:
    """Group all commands by their configuration keys."""
    sets: dict[tuple[str, ...], _CommandsWithSameKeys] = {}
    for name, command in commands.items():
        keys = {key.name: key for key in _keys_of(command)}
        signature = tuple(f"{key.name} {key.type}" for key in keys.values())
        sets.setdefault(signature, _CommandsWithSameKeys([], keys)).commands.append(name)
    return list(sets.values())


def _keys_of(command: Command) -> Iterator[ConfigKey]:
    """Yield the keys of a command; those of list items have the index 0.

    The options of the native engine stand for those of TRL, whose import takes seconds.
    """
    trainer = OPTIONS_BY_COMMAND.get(command.name, NativeOptions)
    options: Mapping[str, type] = {"trainer": trainer} if command.options else {}
    for section in sections_of(import_object(command.config), options):
        for key in section.keys:
            yield replace(key, name=key.name.replace(".N.", ".0."))


_BASH = """\
# Completion of rlhf for {shell}: {load}
{prefix}_rlhf() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  local command="${{COMP_WORDS[1]}}" keys="" values="" position=1
  case "$command" in
    {first_words}) command="$command ${{COMP_WORDS[2]}}"; position=2;;
  esac
  if (( COMP_CWORD <= position )); then
    case "$COMP_CWORD ${{COMP_WORDS[1]}}" in
{second_words}
      *) values={names};;
    esac
    COMPREPLY=($(compgen -W "$values" -- "$current"))
    return
  fi
  case "$command" in
{key_sets}
  esac
  if [[ -n "$values" ]]; then
    COMPREPLY=($(compgen -W "$values" -- "$current"))
  elif [[ "$current" == -* ]]; then
    COMPREPLY=($(compgen -W "{common} $keys" -- "$current"))
  else
    COMPREPLY=()  # the shell completes file names
  fi
}}
complete -o default -F _rlhf rlhf"""


def _bash_script(
    commands: CommandTable, key_sets: Sequence[_CommandsWithSameKeys], *, zsh: bool
) -> str:
    """Return the script for bash, or for zsh, which has the completion functions of bash."""
    shell = "zsh" if zsh else "bash"
    names = " ".join(dict.fromkeys(name.split()[0] for name in commands))
    return _BASH.format(
        shell=shell,
        load=f"source <(rlhf completion {shell})",
        prefix="autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
        * zsh,
        first_words="|".join(sorted(commands.first_words)),
        second_words="\n".join(
            f'      "2 {first}") values={shlex.quote(" ".join(second))};;'
            for first, second in sorted(_second_words(commands).items())
        ),
        names=shlex.quote(f"{names} --help --version"),
        key_sets="\n".join(_bash_case_branch(key_set) for key_set in key_sets),
        common=" ".join(f"--{name}" for name in COMMON_OPTIONS),
    )


def _second_words(commands: CommandTable) -> dict[str, list[str]]:
    """Return first word -> second words, for the commands of two words."""
    words: dict[str, list[str]] = {}
    for name in commands:
        first, *rest = name.split()
        if rest:
            words.setdefault(first, []).extend(rest)
    return words


def _bash_case_branch(key_set: _CommandsWithSameKeys) -> str:
    """Return the `case` branch in bash with the keys and their values of a group of commands."""
    pattern = "|".join(shlex.quote(name) for name in key_set.commands)
    keys = " ".join(f"--{name}" for name in key_set.keys)
    values = "".join(
        f"\n        --{key.name}) values={shlex.quote(' '.join(key.choices))};;"
        for key in key_set.keys.values()
        if key.choices
    )
    inner = f'\n      case "$previous" in{values}\n      esac' if values else ""
    return f"    {pattern})\n      keys={shlex.quote(keys)}{inner};;"


_FISH = """\
# Completion of rlhf for fish: rlhf completion fish | source
function __rlhf_command
    set -l words (commandline -opc)
    set -e words[1]
    set -l name $words[1]
    if contains -- "$name" {first_words}
        set name "$name $words[2]"
    end
    contains -- "$name" $argv
end
function __rlhf_words
    set -l words (commandline -opc)
    test (count $words) -eq $argv[1]; and begin
        test (count $argv) -eq 1; or test "$words[2]" = "$argv[2]"
    end
end
{lines}"""


def _fish_script(commands: CommandTable, key_sets: Sequence[_CommandsWithSameKeys]) -> str:
    """Return the script for fish."""
    lines = []
    for name, command in commands.items():
        first, *rest = name.split()
        if rest:
            condition, word = f"__rlhf_words 2 {first}", rest[0]
        else:
            condition, word = "__rlhf_words 1", first
        lines.append(_fish_complete_command("-f", n=condition, a=word, d=command.summary))
    for first in sorted(commands.first_words):
        lines.append(_fish_complete_command("-f", n="__rlhf_words 1", a=first))
    lines += [_fish_complete_command(l=name, d=text) for name, text in COMMON_OPTIONS.items()]
    for key_set in key_sets:
        condition = f"__rlhf_command {' '.join(map(_fish_quoted, key_set.commands))}"
        for key in key_set.keys.values():
            described = {"n": condition, "l": key.name, "d": shorten(key.description, 80)}
            if key.choices:
                lines.append(_fish_complete_command("-rf", **described, a=" ".join(key.choices)))
            else:
                lines.append(_fish_complete_command("-r", **described))
    return _FISH.format(first_words=" ".join(sorted(commands.first_words)), lines="\n".join(lines))


def _fish_complete_command(*flags: str, **values: str) -> str:
    """Return a `complete` command of fish with short options, such as ``d`` for a description."""
    options = [f"-{name} {_fish_quoted(value)}" for name, value in values.items()]
    return " ".join(["complete -c rlhf", *flags, *options])


def _fish_quoted(word: str) -> str:
    """Return a word in the single quotes of fish, which have two escapes."""
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
