"""Run the calls of environments one after another, or concurrently in threads or processes.

A collector submits the reset or the step of an episode and receives the result later. With one
thread for each environment, environments that wait for a program or a network do not block the
other episodes. The results are the same in all cases, because an environment is called by one
episode at a time. Only the order in which they arrive differs.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium as gym

from rlhf.common import user_code
from rlhf.common.foreign import (
    CodeLocation,
    ensure_ordinary_exceptions,
    exit_as_exception,
    location_text,
    output_to_stderr,
    restored_process_state,
    set_default_location,
)
from rlhf.config.rollout import Concurrency, EnvSpec
from rlhf.envs import is_built_in
from rlhf.errors import UserError
from rlhf.rollout.environments.calls import EnvironmentCaller
from rlhf.rollout.environments.process import ProcessEnvironment

MakeEnvironment = Callable[[], gym.Env]


@dataclass(frozen=True)
class EnvironmentCall:
    """One call of an environment for an episode."""

    env: gym.Env
    seed: int
    """Seed of the episode, for messages."""
    run: Callable[[], Any]
    """Function that calls the environment."""
    receive: Callable[[Any], None]
    """Function that is called with the result, or with None if the call failed and failures are
    counted."""


class EnvironmentWorkers(Protocol):
    """Interface for calls of environments whose results arrive later."""

    caller: EnvironmentCaller
    """Handling of failures, and time limit of a call."""

    def make(self, make_env: MakeEnvironment) -> gym.Env:
        """Make an environment in the thread or process that will run all its calls."""
        ...

    def submit(self, call: EnvironmentCall) -> None:
        """Start a call. An environment has at most one call at a time."""
        ...

    def deliver(self, *, wait: bool) -> None:
        """Pass the results that have arrived to their receivers, in the main thread.

        Args:
            wait: Whether to wait for a result if none has arrived and a call is running.

        Raises:
            UserError: A call raised a UserError, or it failed and ``EnvironmentCaller.errors`` is
                "raise".
        """
        ...

    @property
    def num_undelivered_calls(self) -> int:
        """Number of calls whose results have not been delivered yet."""
        ...

    def discard_running_calls(self) -> Sequence[gym.Env]:
        """Discard the results of all running calls.

        Returns:
            Environments that are still busy and cannot be used again.
        """
        ...

    def close(self, env: gym.Env) -> None:
        """Close an environment. A failure is only logged as a warning."""
        ...

    def limit_side_effects_of_calls(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager in which calls are submitted.

        While it is active, the side effects of third-party code in other threads are limited.
        """
        ...


class LockstepWorkers:
    """``EnvironmentWorkers`` that run every call immediately in the calling thread.

    Args:
        caller: Handling of failures, and time limit of a call.
    """

    def __init__(self, caller: EnvironmentCaller) -> None:
        self.caller = caller
        self._results: deque[tuple[EnvironmentCall, Any]] = deque()

    def make(self, make_env: MakeEnvironment) -> gym.Env:
        """Make an environment in the calling thread."""
        return make_env()

    def submit(self, call: EnvironmentCall) -> None:
        """Run a call."""
        self._results.append((call, self.caller.run(call.seed, call.run)))

    def deliver(self, *, wait: bool) -> None:
        """Pass the results to their receivers, in the order of the calls."""
        while self._results:
            call, result = self._results.popleft()
            call.receive(result)

    @property
    def num_undelivered_calls(self) -> int:
        """Number of calls whose results have not been delivered yet."""
        return len(self._results)

    def discard_running_calls(self) -> Sequence[gym.Env]:
        """Discard the results of calls."""
        self._results.clear()
        return ()

    def close(self, env: gym.Env) -> None:
        """Close an environment. A failure is only logged as a warning."""
        self.caller.close(env)

    def limit_side_effects_of_calls(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager without effect: `EnvironmentCaller.run` limits each call."""
        return contextlib.nullcontext()


class _EnvironmentThread:
    """A thread that makes one environment and runs all its calls.

    Environments may contain objects that only the thread that made them can use. The thread is a
    daemon, because a call that does not return cannot be stopped and must not prevent the end of
    the process.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_tasks, name="environment", daemon=True)
        self._thread.start()

    def _run_tasks(self) -> None:
        while task := self._tasks.get():
            task()

    def user_code_location(self) -> CodeLocation | None:
        """Return the line of the user's code that the thread executes now, or None."""
        return user_code.user_code_location_of_thread(self._thread.ident)

    def enqueue(self, task: Callable[[], None]) -> None:
        """Queue a task, which the thread runs after the earlier tasks."""
        self._tasks.put(task)

    def end_after_queued_tasks(self) -> None:
        """End the thread after all queued tasks."""
        self._tasks.put(None)


@dataclass(frozen=True)
class _Outcome:
    """Result or error of a call in a thread."""

    value: Any = None
    error: Exception | None = None


def _run_for_outcome(run: Callable[[], Any]) -> _Outcome:
    """Run third-party code; return its result or the exception that it raised."""
    try:
        with ensure_ordinary_exceptions():
            return _Outcome(run())
    except Exception as error:
        return _Outcome(error=error)


def _log_close_failure(caller: EnvironmentCaller, outcome: _Outcome) -> None:
    """Log a warning if the outcome of closing an environment is an error."""
    if outcome.error is not None:
        caller.warn_not_closed(outcome.error)


class ThreadedWorkers:
    """``EnvironmentWorkers`` with one thread for each environment.

    A call that exceeds the time limit fails, and its environment is discarded. Its thread continues
    until the call returns.

    Args:
        caller: Handling of failures, and time limit of a call.
        isolated: Whether each environment runs in its own process. A process is killed if a call
            exceeds the time limit.
    """

    def __init__(self, caller: EnvironmentCaller, *, isolated: bool = False) -> None:
        self.caller, self.isolated = caller, isolated
        self._threads: dict[int, _EnvironmentThread] = {}  # by id of the environment
        # By id of the environment: the call and its start time, in the order of the starts.
        self._running: dict[int, tuple[EnvironmentCall, float]] = {}
        self._results: queue.SimpleQueue[tuple[EnvironmentCall, _Outcome]] = queue.SimpleQueue()

    def make(self, make_env: MakeEnvironment) -> gym.Env:
        """Make an environment in a new thread, which runs all its calls.

        Raises:
            UserError: The environment cannot be made, or this takes longer than the time limit.
        """
        thread, made = _EnvironmentThread(), queue.SimpleQueue()
        limit, make = self.caller.timeout, make_env
        if self.isolated:
            make = functools.partial(ProcessEnvironment, make_env, timeout=limit)
        try:
            with self.limit_side_effects_of_calls():
                thread.enqueue(lambda: made.put(_run_for_outcome(make)))
                outcome: _Outcome = made.get(timeout=None if self.isolated else limit)
        except queue.Empty:
            location = location_text(thread.user_code_location())
            thread.end_after_queued_tasks()
            raise UserError(
                f"env.id: the environment cannot be made: took longer than {limit:g} s{location}; "
                "correct its constructor, or raise env.timeout"
            ) from None
        if outcome.error is not None:
            thread.end_after_queued_tasks()
            raise outcome.error
        self._threads[id(outcome.value)] = thread
        return outcome.value

    def submit(self, call: EnvironmentCall) -> None:
        """Start a call in the thread of its environment."""
        self._running[id(call.env)] = call, time.monotonic()
        self._threads[id(call.env)].enqueue(lambda: self._results.put((call, self._run(call))))

    def _run(self, call: EnvironmentCall) -> _Outcome:
        """Run a call in the thread of its environment.

        The outcome of a call that succeeds after the time limit is a TimeoutError.
        """
        start, limit = time.monotonic(), self.caller.timeout
        outcome = _run_for_outcome(call.run)
        # While the engine was busy, the main thread did not wait for the result, so it has not
        # noticed that the limit was exceeded.
        if limit is not None and not outcome.error and time.monotonic() - start > limit:
            return self._timeout_outcome(None)
        return outcome

    def _timeout_outcome(self, location: CodeLocation | None) -> _Outcome:
        """Return the failure of a call that exceeded the time limit.

        Args:
            location: Line of the code that the call was running; None if it is not known.
        """
        error = TimeoutError(f"took longer than {self.caller.timeout:g} s")
        if location is not None:
            set_default_location(error, location)
        return _Outcome(error=error)

    def deliver(self, *, wait: bool) -> None:
        """Pass the results that have arrived to their receivers; see `EnvironmentWorkers`."""
        delivered = False
        while self._running:
            arrived = self._pop_next_outcome(wait=wait and not delivered)
            if arrived is None:
                return
            call, outcome = arrived
            if outcome.error is not None:
                self.caller.record_failure(call.seed, outcome.error)
            call.receive(outcome.value)
            delivered = True

    def _pop_next_outcome(self, *, wait: bool) -> tuple[EnvironmentCall, _Outcome] | None:
        """Return a finished call with its outcome, or a call that exceeds the time limit.

        The call is removed from the running calls. The environment of a call that exceeds the time
        limit is discarded.

        Returns:
            The call and its outcome; None if there is none and ``wait`` is False.
        """
        limit = self.caller.timeout
        while True:
            call, start = next(iter(self._running.values()))
            remaining = None if limit is None else start + limit - time.monotonic()
            patience = user_code.SLOW_SECONDS if remaining is None else max(remaining, 0)
            with contextlib.suppress(queue.Empty):
                arrived = (
                    self._results.get(timeout=patience) if wait else self._results.get_nowait()
                )
                # The result is ignored if the call was discarded, or if it has exceeded the time
                # limit, so that a TimeoutError was delivered.
                if self._running.get(id(arrived[0].env), (None,))[0] is arrived[0]:
                    del self._running[id(arrived[0].env)]
                    return arrived
                continue
            if remaining is not None and remaining <= 0:
                location = self._threads[id(call.env)].user_code_location()
                self._abandon_busy_environment(call.env)
                return call, self._timeout_outcome(location)
            if not wait:
                return None
            if remaining is None and time.monotonic() - start >= user_code.SLOW_SECONDS:
                user_code.warn_of_slow_call(
                    "a call of the environment",
                    self._threads[id(call.env)].user_code_location(),
                    "to limit its time, set env.timeout",
                )

    def _abandon_busy_environment(self, env: gym.Env) -> None:
        """Discard an environment whose thread is busy.

        The environment is closed when its call returns. If it runs in its own process, the process
        is killed instead.
        """
        self._running.pop(id(env), None)
        thread = self._threads.pop(id(env))
        if isinstance(env, ProcessEnvironment):
            env.kill()
        else:
            thread.enqueue(lambda: _log_close_failure(self.caller, _run_for_outcome(env.close)))
        thread.end_after_queued_tasks()

    @property
    def num_undelivered_calls(self) -> int:
        """Number of calls whose results have not been delivered yet."""
        return len(self._running)

    def discard_running_calls(self) -> Sequence[gym.Env]:
        """Discard the results of running calls, and return their environments."""
        busy = [call.env for call, _ in self._running.values()]
        for env in busy:
            self._abandon_busy_environment(env)
        return busy

    def close(self, env: gym.Env) -> None:
        """Close an environment in its thread. A failure is only logged as a warning."""
        thread = self._threads.pop(id(env), None)
        if thread is None:  # its thread was abandoned
            return
        closed: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        try:
            with self.limit_side_effects_of_calls():
                thread.enqueue(lambda: closed.put(_run_for_outcome(env.close)))
                outcome = closed.get(timeout=self.caller.timeout)
        except queue.Empty:
            outcome = _Outcome(error=TimeoutError("closing takes too long"))
            if isinstance(env, ProcessEnvironment):
                env.kill()
        thread.end_after_queued_tasks()
        _log_close_failure(self.caller, outcome)

    @contextlib.contextmanager
    def limit_side_effects_of_calls(self) -> Iterator[None]:
        """Return a context manager that limits the side effects of all threads.

        Standard output is redirected to standard error, ``os._exit`` raises an exception, and the
        state of the process is restored at the end.
        """
        with (
            output_to_stderr(),
            restored_process_state(),
            exit_as_exception(),
        ):
            yield


def resolved_concurrency(spec: EnvSpec) -> Concurrency:
    """Return how calls of environments are scheduled.

    This is ``spec.concurrency``. "auto" is "lockstep" for prompts and for the toolkit's own
    environments, and "threads" for other environments.
    """
    if spec.concurrency != "auto":
        return spec.concurrency
    return "lockstep" if spec.id is None or is_built_in(spec.id) else "threads"


def workers_for(spec: EnvSpec) -> EnvironmentWorkers:
    """Return the workers of a configuration."""
    caller, concurrency = EnvironmentCaller.from_spec(spec), resolved_concurrency(spec)
    if concurrency == "lockstep":
        return LockstepWorkers(caller)
    return ThreadedWorkers(caller, isolated=concurrency == "processes")
