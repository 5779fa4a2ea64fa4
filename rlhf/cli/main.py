"""Entry point of the command line: parse a command, run it and report errors.

A user's mistake is reported in one line, with exit code 2. Large libraries are imported only if a
command needs them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

from rlhf import __version__
from rlhf.cli.arguments import parse_arguments
from rlhf.cli.help import command_help, group_help, program_help
from rlhf.cli.table import COMMANDS
from rlhf.common.files import describe_write_error, find_write_error
from rlhf.common.foreign import describe_exception, end_process, user_code_location
from rlhf.common.imports import import_object
from rlhf.common.launcher import launcher_number
from rlhf.common.plugins import load_installed_plugins, loaded_user_files
from rlhf.common.signals import StopSignal
from rlhf.common.text import escape_invisible, mask_secrets, set_up_logging
from rlhf.common.yaml_text import dump_yaml
from rlhf.config.load import assemble_tree_and_load_plugins
from rlhf.errors import UserError
from rlhf.runs.interrupt import Interrupted, stop_signals_as_exceptions
from rlhf.runs.launch import prepare_process

_PATH_ERRORS = frozenset(
    [errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST]
)
"""Numbers of the errors for a path that cannot exist, or that names a file instead of a folder or a
folder instead of a file."""


THREAD_SECONDS = 30.0
"""Seconds that threads of imported code are given to end after the command has ended."""


def run_program() -> int:
    """Run the command of this process, and let the process end even if threads still run.

    Python waits for threads that are not daemons. If an environment or a reward has left such a
    thread, the process of a finished run would not end, and its machine would remain in use.
    """
    with stop_signals_as_exceptions():
        code = main()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # A second Ctrl-C ends the process at once. A KeyboardInterrupt while the process ends would
        # print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    others = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    if others:
        threading.Thread(target=_end_process_later, args=(code,), daemon=True).start()
    return code


def _end_process_later(code: int) -> None:
    """End the process with an exit code after `THREAD_SECONDS`, although threads still run."""
    time.sleep(THREAD_SECONDS)
    _print_error("rlhf: a thread of imported code still runs, so the process ends without it")
    end_process(code)  # `os._exit` is replaced while code of the user still runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The exit code is 0 for success and 2 for a user's mistake (1 with ``--debug``). It is 1 for a
    bug, or if the command found a fault such as leakage in the data; `rlhf envs check` returns 2 in
    this case. If a signal stops the command, the exit code is 128 plus the signal's number, as in a
    shell.

    Args:
        arguments: The arguments after the program's name; by default, those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    prepare_process()
    code = 0
    try:
        _set_up_logging()
        load_installed_plugins()
        _load_plugins_for_unknown_command(words)
        if text := _help_or_version_text(words):
            print(escape_invisible(text))
            return 0
        name = _command_name(words)
        parsed = parse_arguments(words[len(name.split()) :])
        command = COMMANDS[name]
        if parsed.has_any_flag("--help", "-h"):
            print(escape_invisible(command_help(command, parsed)))
            return 0
        calls = [parsed]
        if parsed.positional:
            calls = parsed.bind_positional_to_keys(
                name, command.arguments, import_object(command.config)
            )
        for call in calls:
            config = COMMANDS.read_config(name, call.files, call.overrides)
            if call.has_any_flag("--print-config"):
                print(dump_yaml(COMMANDS.effective_config_tree(name, config)))
            elif call.has_any_flag("--dry-run"):
                if text := COMMANDS.plan(name, config):  # only the first process returns a text
                    print(escape_invisible(text))
            elif command.makes_run:
                print(escape_invisible(str(COMMANDS.run_command_with_config(name, config))))
            else:
                code = max(code, _run_and_print_output(name, config))
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt, StopSignal, SystemExit) as error:
        return _report_error(error, debug=debug)


def _load_plugins_for_unknown_command(words: Sequence[str]) -> None:
    """Load the plug-ins of the configuration if the command can be that of a plug-in.

    The help of the program, ``rlhf --help --plugins my_code.py``, then lists the commands of the
    plug-ins. A known command loads its plug-ins when its configuration is read.
    """
    options = {word.partition("=")[0] for word in words}
    if {"--config", "--plugins"} & options and _command_name(words) not in COMMANDS:
        parsed = parse_arguments(words)
        assemble_tree_and_load_plugins(parsed.files, parsed.overrides)


def _help_or_version_text(words: Sequence[str]) -> str:
    """Return the program's help, the help of a group of commands, or the version, if requested.

    The result is "" if the arguments request none of these texts.
    """
    if not words or words[0] in ("--help", "-h", "help"):
        return program_help(COMMANDS)
    if words[0] == "--version":
        return f"rlhf {__version__}"
    wants_help = not {"--help", "-h"}.isdisjoint(words)
    if wants_help and words[0] in COMMANDS.first_words and _command_name(words) not in COMMANDS:
        return group_help(COMMANDS, words[0])
    return ""


def _command_name(words: Sequence[str]) -> str:
    """Return the first word, or the first two for a command such as `envs list`."""
    return " ".join(words[: 2 if words[0] in COMMANDS.first_words else 1])


def _run_and_print_output(name: str, config: Any) -> int:
    """Print the output of a command without a run directory; return its exit code."""
    output = COMMANDS.run_and_yield_text(name, config)
    while True:
        try:
            # A server prints its URL and then runs, so the text must not wait in a buffer.
            print(escape_invisible(next(output)), flush=True)
        except StopIteration as end:
            return end.value or 0


def _set_up_logging() -> None:
    first = launcher_number("RANK") == 0  # the other processes log only errors
    set_up_logging(logging.INFO if first else logging.ERROR)
    for library in ("httpx", "httpcore", "datasets", "filelock", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)


def _report_error(error: BaseException, *, debug: bool) -> int:
    """Print the error that ended a command, and return the exit code.

    The traceback is printed for a bug of the toolkit, and for every error if `debug` is true.
    """
    if isinstance(error, BrokenPipeError):  # the reader closed the pipe: `rlhf envs list | head`
        _discard_output_that_cannot_be_written()
        return 128 + signal.SIGPIPE
    if isinstance(error, StopSignal):
        _print_error(f"rlhf: stopped by {error}")
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        _print_error("rlhf: stopped by the user")
        return 128 + signal.SIGINT
    if isinstance(error, Interrupted):
        _print_error(f"rlhf: {error}")
        return 128 + error.number
    if isinstance(error, SystemExit) and not _is_in_user_code(error):
        # The exit code 0 without a result would look like success.
        _print_error(f"rlhf: imported code called sys.exit({error.code!r})")
        return 1
    if not debug and not isinstance(error, UserError) and (cause := find_write_error(error)):
        _discard_output_that_cannot_be_written()
        path = f"{cause.filename}: " if cause.filename else ""
        _print_error(
            f"rlhf: {path}{describe_write_error(cause)}, then repeat the command (a run continues "
            "with --resume)"
        )
        return 2
    if not debug and isinstance(error, OSError) and error.errno in _PATH_ERRORS:
        path = mask_secrets(escape_invisible(str(error.filename)))
        _print_error(f"rlhf: {path[:200]}{'…' * (len(path) > 200)}: {error.strerror}")
        return 2
    if not debug and isinstance(error, FileNotFoundError) and not _has_working_directory():
        _print_error("rlhf: the working directory was deleted: change to another folder")
        return 2
    if not debug and isinstance(error, ValueError) and str(error).startswith("embedded null"):
        _print_error("rlhf: a path or name contains a null character: remove it")
        return 2
    if not debug and not isinstance(error, UserError) and _is_in_user_code(error):
        reason = mask_secrets(escape_invisible(describe_exception(error)))
        _print_error(f"rlhf: your code failed: {reason}; --debug shows the traceback")
        return 2
    # A UserError or an unreadable file is the user's mistake; any other error is a bug.
    if debug or not isinstance(error, UserError | FileNotFoundError | PermissionError):
        trace = "".join(traceback.format_exception(error))
        _print_error(mask_secrets(escape_invisible(trace)).rstrip("\n"))
        return 1
    _print_error(f"rlhf: {mask_secrets(escape_invisible(' '.join(str(error).split())))}")
    return 2


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _discard_output_that_cannot_be_written() -> None:
    """Redirect standard output to the null device if it cannot be written.

    Python flushes it when the process ends.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_in_user_code(error: BaseException) -> bool:
    """Return whether an error was raised in code of the user, or in code that it called."""
    files, location = loaded_user_files(), user_code_location(error)
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename in files for frame in frames) or (
        location is not None and location[0] in files
    )


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal was closed; the exit code is unchanged
        print(text, file=sys.stderr, flush=True)
