"""The command line: a command, then options. A user's mistake is one line and exit code 2.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import yaml

from rlhf import __version__
from rlhf.cli.arguments import Arguments, parse_arguments
from rlhf.cli.help import command_help, group_help, usage
from rlhf.cli.table import COMMANDS
from rlhf.common.imports import import_object
from rlhf.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code (0: done, 1: a bug or a fault, 2: a user's mistake)."""
    from rlhf.runs import launch

    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    launch.prepare()
    _set_up_logging()
    try:
        code = dispatch(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `rlhf envs list | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the exit flushes it
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("rlhf: stopped by the user", file=sys.stderr)
        return 2
    except Exception as error:
        if debug or not _is_user_mistake(error):
            traceback.print_exc()
            return 1
        print(f"rlhf: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def dispatch(words: Sequence[str]) -> int:
    """Run the command that the first one or two words name; return the exit code.

    Raises:
        UserError: There is no such command, or its arguments are wrong.
    """
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage(COMMANDS))
        return 0
    if words[0] == "--version":
        print(f"rlhf {__version__}")
        return 0
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    arguments = parse_arguments(words[len(name.split()) :])
    if name not in COMMANDS and any(other.startswith(f"{name} ") for other in COMMANDS):
        if arguments.has("--help", "-h"):
            print(group_help(COMMANDS, name))
            return 0
        name = " ".join([name, *arguments.positional[:1]])
    command = COMMANDS.find(name)
    if arguments.has("--help", "-h"):
        print(command_help(COMMANDS, command, arguments))
        return 0
    calls = arguments.per_call(command.name, command.arguments, import_object(command.config))
    return max(_run(name, call) for call in calls)


def _run(name: str, arguments: Arguments) -> int:
    """Run a command with its configuration, or show what it would do."""
    config = COMMANDS.read(name, arguments.files, arguments.overrides)
    if arguments.has("--print-config"):
        tree = COMMANDS.settings_in_force(name, config)
        print(yaml.safe_dump(tree, sort_keys=False))
    elif arguments.has("--dry-run"):
        print(COMMANDS.plan(name, config))
    elif COMMANDS[name].makes_run:
        print(COMMANDS.run_config(name, config))
    else:
        return _print_output(name, config)
    return 0


def _print_output(name: str, config: Any) -> int:
    """Print what a command without a run directory yields; return its exit code."""
    output = COMMANDS.output(name, config)
    while True:
        try:
            print(next(output))
        except StopIteration as end:
            return end.value or 0


def _set_up_logging() -> None:
    first = os.environ.get("RANK", "0") == "0"  # one of several processes logs
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpcore", "datasets", "filelock", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)


def _is_user_mistake(error: Exception) -> bool:
    """Whether an error is a refusal of this toolkit or an unreadable file, and not a bug."""
    return isinstance(error, UserError | FileNotFoundError | PermissionError)
