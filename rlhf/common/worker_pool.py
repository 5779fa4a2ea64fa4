"""Apply a function to tasks in worker processes.

The workers are new Python processes, not forks: a fork would copy locks that other threads of this
process hold, and nothing would release the copies. They do not import the user's script, so a
script without a main guard works.
"""

from __future__ import annotations

import gc
import os
import queue
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Self

from rlhf.common.imports import import_object
from rlhf.common.plugins import load_plugins_of_parent
from rlhf.errors import UserError

_PROGRAM = (
    "import sys; from rlhf.common.worker_pool import run_worker_tasks; "
    "run_worker_tasks(int(sys.argv[1]))"
)
_THREAD_LIMITS = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
}
"""Environment variables of workers: every worker computes in one thread."""
_GARBAGE_THRESHOLD = 100_000
"""Number of new objects after which a worker starts a garbage collection."""


class WorkerPool:
    """Processes that apply one function to tasks.

    The pool is a context manager, which ends the processes.

    Args:
        count: Number of worker processes. With fewer than two, the function runs in this process.
        factory: Name "module:function" of a function that returns the function to apply. It is
            called once in each process.
        arguments: Picklable arguments of ``factory``.
    """

    def __init__(self, count: int, factory: str, arguments: tuple[Any, ...]) -> None:
        self._workers: list[_Worker] = []
        self._function: Callable[[Any], Any] | None = None
        if count < 2:
            self._function = import_object(factory)(*arguments)
            return
        self._threads = ThreadPoolExecutor(count)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        try:
            for _ in range(count):
                self._workers.append(_Worker())
            for worker in self._workers:
                self._idle.put(worker)
                # The arguments can exceed the buffer of the connection, so a thread sends them.
                worker.ready = self._threads.submit(worker.call, (factory, arguments))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yield the result of every task, in the order of the tasks.

        Only a few tasks are in progress at a time, so the results may be large in total.

        Raises:
            UserError: The function raised it, or a process was killed.
            RuntimeError: The function raised another exception in a worker process. The message
                has its traceback.
        """
        if self._function is not None:
            yield from map(self._function, tasks)
            return
        pending: deque[Future[Any]] = deque()
        for task in tasks:
            pending.append(self._threads.submit(self._call, task))
            if len(pending) > 2 * len(self._workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """End all processes, even if they are working on a task."""
        for worker in self._workers:
            worker.kill()
        if self._function is None:
            self._threads.shutdown(cancel_futures=True)

    def _call(self, task: Any) -> Any:
        worker = self._idle.get()
        try:
            worker.ready.result()
            return worker.call(task)
        finally:
            self._idle.put(worker)


class _Worker:
    """A worker process and the connection to it."""

    ready: Future[Any]

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            # In a session of its own, the process gets no Ctrl-C; it ends when the connection does.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | _THREAD_LIMITS | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()

    def call(self, task: Any) -> Any:
        """Return the result of the process for a task; see `WorkerPool.map` for the errors."""
        with self._lock:
            try:
                self._connection.send(task)
                kind, content = self._connection.recv()
            except (EOFError, OSError) as error:
                code = self._process.wait()
                raise UserError(
                    f"a process that prepares the data ended with exit code {code}, perhaps for "
                    "lack of memory; set data_processes to a smaller number"
                ) from error
        if kind == "result":
            return content
        raise UserError(content) if kind == "user error" else RuntimeError(content)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def run_worker_tasks(descriptor: int) -> None:
    """Apply the function of a pool to tasks until the connection is closed.

    The first message is the factory of the function and its arguments; the answer is None.

    Args:
        descriptor: File descriptor of the connection to the pool.
    """
    connection = Connection(descriptor)
    function: Callable[[Any], Any] | None = None
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if function is None:
                load_plugins_of_parent()
                factory, arguments = task
                function, result = import_object(factory)(*arguments), None
                _collect_garbage_rarely()
            else:
                result = function(task)
            outcome = "result", result
        except UserError as error:
            outcome = "user error", str(error)
        except Exception:
            outcome = "error", traceback.format_exc()
        try:
            connection.send(outcome)
        except OSError:  # the pool was closed
            return


def _collect_garbage_rarely() -> None:
    """Exclude all present objects from garbage collection, and make later collections rare.

    The objects of a task are freed by their reference counts. The default thresholds of Python
    start hundreds of collections per task, which visit the objects of the task that still exist.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE_THRESHOLD)


def available_cpus() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
