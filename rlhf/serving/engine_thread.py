"""The thread that loads a model and later runs its engine."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class EngineThread:
    """Runs functions one after another in one thread, which does not keep the process alive.

    A model is loaded in the thread in which the engine computes, because every thread that computes
    has OpenMP threads of its own. With more OpenMP threads than processors, GNU OpenMP lets a
    waiting thread sleep almost at once (its manual, GOMP_SPINCOUNT), which slows decoding down.
    """

    def __init__(self) -> None:
        self._functions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def start(self, function: Callable[[], T]) -> Future[T]:
        """Queue a function, which runs after the earlier ones; return the future of its result."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # the caller receives it from the future
                future.set_exception(error)

        self._functions.put(run)
        return future

    def call(self, function: Callable[[], T]) -> T:
        """Run a function after the earlier ones; wait for its result, or raise its exception."""
        return self.start(function).result()

    def close(self) -> None:
        """End the thread after all queued functions have run. This method does not wait."""
        self._functions.put(None)

    def _run(self) -> None:
        while (function := self._functions.get()) is not None:
            function()
