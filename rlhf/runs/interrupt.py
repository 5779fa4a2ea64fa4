"""Handle signals: after a signal, a run finishes the current step, saves a checkpoint and stops."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from rlhf.common.signals import STOP_SIGNALS, StopSignal
from rlhf.errors import UserError

REPEAT_SECONDS = 2.0
"""In a worker process, a repeated signal counts as the same request for this time. A worker
receives a signal to the whole job twice: from the sender and from its parent, such as torchrun or
the script of a task of Slurm."""


class Interrupted(UserError):
    """Error that ends a run or a server after a signal.

    A training run has then saved a checkpoint of its last completed step.

    Args:
        message: Name of the signal and how to continue.
        number: Number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def stop_signals_as_exceptions() -> Iterator[None]:
    """Return a context manager during which SIGTERM and SIGHUP raise `StopSignal`.

    By default, these signals end the process without its clean-up, for example while a run that
    replaces another one is prepared. Only the first signal raises the exception; another one ends
    the process. An ignored signal remains ignored. Nothing changes in a process that torchrun has
    started, because such a process waits for the others in calls that no exception can end.
    """
    owner = os.getpid()

    def raise_exception(number: int, frame: FrameType | None) -> None:
        restore()
        if os.getpid() != owner:  # a forked worker process, which its parent ends
            signal.raise_signal(number)
            return
        raise StopSignal(number)

    numbers = [n for n in STOP_SIGNALS if signal.getsignal(n) == signal.SIG_DFL]
    numbers = [] if "TORCHELASTIC_RUN_ID" in os.environ else numbers

    def restore() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, raise_exception)
    try:
        yield
    finally:
        restore()


class StopSignalRecorder:
    """Context manager that records the first signal in ``number`` instead of ending the process.

    A second signal is passed to the previous handler, which usually ends the process. A worker
    process ignores the same signal within `REPEAT_SECONDS`.

    Args:
        raise_at_once_for: If set, the first signal raises Interrupted with this directory in the
            message, for a process that waits for other processes and has no steps to finish.
    """

    def __init__(self, *, raise_at_once_for: object = None) -> None:
        self.number: int | None = None
        self._raise_for = raise_at_once_for
        self._received = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the process received a signal."""
        return self.number is not None

    def __enter__(self) -> StopSignalRecorder:
        # Only the main thread may install handlers. In other threads, signals are not recorded.
        # An ignored signal remains ignored; for example, `nohup` ignores SIGHUP.
        if threading.current_thread() is threading.main_thread():
            active = [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
            self._previous = {s: signal.signal(s, self._record_signal) for s in active}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal; pass another one, unless it is repeated, to the old handler."""
        now = time.monotonic()
        if self.number is None:
            self.number, self._received = number, now
            if self._raise_for is not None:
                self.raise_if_requested(self._raise_for)
        elif not (_is_worker_process() and self._is_repeated(number, now)):
            self.__exit__()
            signal.raise_signal(number)

    def _is_repeated(self, number: int, now: float) -> bool:
        return number == self.number and now - self._received <= REPEAT_SECONDS

    def raise_if_requested(self, directory: object) -> None:
        """Raise Interrupted if the process received a signal.

        Call this method after a checkpoint is written.

        Args:
            directory: The run directory, for the message.
        """
        if self.number is not None:
            raise Interrupted(
                f"stopped by {signal.Signals(self.number).name}; continue with --resume "
                f"({directory})",
                self.number,
            )


def _is_worker_process() -> bool:
    """Return whether a parent process of the same job passes signals on to this process."""
    launchers = {"TORCHELASTIC_RUN_ID", "SLURM_ARRAY_TASK_ID"}
    return bool(launchers & os.environ.keys()) or multiprocessing.parent_process() is not None
