"""An environment in its own process, which can be killed and whose end does not end the run."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym

from rlhf.common.foreign import (
    CodeLocation,
    ensure_ordinary_exceptions,
    location_text,
    set_default_location,
    user_code_location,
)
from rlhf.common.plugins import load_plugins_of_parent
from rlhf.common.signals import STOP_SIGNALS
from rlhf.common.user_code import add_location_to_errors, definition_location
from rlhf.common.worker_process import SpawnContextWithoutUserScript, end_with_parent
from rlhf.errors import UserError, first_line

START_SECONDS = 60.0
"""Seconds that are added to the time limit of ``make_env``, because a process must start."""


class ProcessEnvironment(gym.Env):
    """Passes the calls of `reset`, `step` and `close` to an environment in another process.

    The actions, observations and infos must be picklable. The attributes that a collector reads
    (action space, system message and turn limits) are copied when the environment is made. If the
    process has ended, a call raises RuntimeError.

    Args:
        make_env: Picklable function that makes the environment.
        timeout: Time limit of ``make_env`` in seconds, in addition to `START_SECONDS`. By default,
            there is no limit.

    Raises:
        UserError: The environment cannot be made.
    """

    def __init__(self, make_env: Callable[[], gym.Env], *, timeout: float | None = None) -> None:
        # A forked process would inherit locks that other threads of this process may hold.
        context = SpawnContextWithoutUserScript()
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_serve_environment_calls, args=(other, make_env), daemon=True
        )
        try:
            self._process.start()
            # When this process ends, multiprocessing sends SIGTERM to the worker, which ignores it,
            # and waits for the worker. So the worker is killed before.
            atexit.register(self._process.kill)
            other.close()
            if timeout is not None and not self._connection.poll(timeout + START_SECONDS):
                raise TimeoutError(f"took longer than {timeout:g} s")
            attributes = self._receive()
        except Exception as error:
            self.kill()
            if isinstance(error, UserError):
                raise
            location = location_text(user_code_location(error))
            reason = f"{type(error).__name__}: {first_line(error)}{location}"
            raise UserError(f"env.id: the environment cannot be made: {reason}") from error
        self.action_space = attributes["action_space"]
        self.system_prompt: str | None = attributes["system_prompt"]
        self.max_turns: int | None = attributes["max_turns"]
        self.definitions: dict[str, CodeLocation | None] = attributes["definitions"]
        """Name of a method -> file and line of its definition."""
        self._name = attributes["name"]
        steps = attributes["max_episode_steps"]
        self.spec = types.SimpleNamespace(max_episode_steps=steps)  # type: ignore[assignment]

    def __str__(self) -> str:
        return self._name

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Reset the environment."""
        return self._call("reset", seed=seed, options=options)

    def step(self, action: Any) -> Any:
        """Step the environment."""
        return self._call("step", action)

    def close(self) -> None:
        """Close the environment, without a time limit, and then kill its process."""
        try:
            self._call("close")
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process at once. A call that is waiting in another thread fails."""
        atexit.unregister(self._process.kill)
        if self._process.pid is not None:
            self._process.kill()

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        try:
            self._connection.send((name, arguments, options))
        except OSError as error:
            raise self._process_ended_error() from error
        return self._receive()

    def _receive(self) -> Any:
        """Return the next result of the process, or raise its error.

        An error other than UserError is raised as an Exception of a new class, which has the name
        of the original class.
        """
        try:
            is_result, content = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._process_ended_error() from error
        if is_result:
            return content
        kind, message, location = content
        error = (UserError if kind == UserError.__name__ else type(kind, (Exception,), {}))(message)
        if location is not None:
            set_default_location(error, location)
        raise error

    def _process_ended_error(self) -> RuntimeError:
        self._process.join()
        return RuntimeError(
            f"the process of the environment ended with exit code {self._process.exitcode}"
        )


def _serve_environment_calls(connection: Connection, make_env: Callable[[], gym.Env]) -> None:
    """Make an environment and run calls until the connection is closed; send every outcome."""
    _ignore_stop_signals()
    end_with_parent()
    os.dup2(2, 1)  # standard output is reserved for the results of the command
    env: Any = None

    def make() -> dict[str, Any]:
        """Make the environment of the calls below; return the attributes that the run reads."""
        nonlocal env
        load_plugins_of_parent()
        env = make_env()
        task = type(env.unwrapped)
        return {
            "name": str(env),
            "action_space": env.action_space,
            "system_prompt": getattr(env.unwrapped, "system_prompt", None),
            "max_turns": getattr(env.unwrapped, "max_turns", None),
            "max_episode_steps": getattr(env.spec, "max_episode_steps", None),
            "definitions": {
                name: definition_location(getattr(task, name, None)) or definition_location(task)
                for name in ("reset", "step")
            },
        }

    _send_outcome(connection, make)
    while True:
        try:
            name, arguments, options = connection.recv()
        except EOFError:
            return
        call = functools.partial(getattr(env, name), *arguments, **options)
        _send_outcome(connection, call, method=getattr(type(env.unwrapped), name, None))


def _ignore_stop_signals() -> None:
    """Ignore the signals that stop a run.

    Ctrl-C, a closed terminal and a scheduler send a signal to all processes of a run, but only the
    main process decides when the run stops. The handler is a function, because the programs that
    the environment starts would inherit SIG_IGN.
    """
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=restore)


def _send_outcome(connection: Connection, run: Callable[[], Any], *, method: Any = None) -> None:
    """Send (True, result), or (False, (name of the exception, message, file and line)).

    Args:
        connection: Connection to the process of the run.
        run: Function that calls the environment.
        method: The method that it calls.
    """
    try:
        with ensure_ordinary_exceptions(), add_location_to_errors(method):
            result = run()
    except Exception as error:
        location = user_code_location(error)
        connection.send((False, (type(error).__name__, first_line(error), location)))
        return
    try:
        connection.send((True, result))
    except Exception as error:
        problem = (
            f"{first_line(error)}; return values that can be pickled, or set env.concurrency: "
            "threads"
        )
        location = definition_location(method)
        connection.send((False, (type(error).__name__, problem, location)))
