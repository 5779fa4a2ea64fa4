"""Data-parallel training, which divides episodes and micro-batches among processes.

``torchrun`` or ``accelerate launch`` starts the processes; without a launcher, there is one process
and no communication. Every process samples and scores a part of the episodes and receives all
rollouts, so baselines, whitening and denominators are those of the global batch. Forward and
backward passes are divided by micro-batch, and the gradients are summed. Every process has a copy
of the model, or a part of it if its weights are sharded
(`rlhf.models.sharding`).

If a process ends, the other processes end with a one-line error. They do so at their next
collective operation, or within a minute if they are waiting in a collective operation.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from rlhf.algorithms.metrics import MetricSums
from rlhf.common.foreign import end_process
from rlhf.common.launcher import launcher_number
from rlhf.errors import UserError, first_line
from rlhf.models.precision import default_device
from rlhf.models.sharding.tensors import is_sharded
from rlhf.runs.launch import configure_malloc_to_return_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


START_TIMEOUT_SECONDS = 300.0
"""Time for which a process waits until the others have started."""
HEARTBEAT_SECONDS = 5.0
"""Interval between two heartbeats of a process."""
HEARTBEAT_TIMEOUT_SECONDS = 40.0
"""A process is considered lost after this time without a heartbeat."""
LOST_PROCESS_MESSAGE = (
    "another process of this run ended, so this process ends too; all checkpoints are complete, "
    "so continue with --resume"
)


@dataclass
class Heartbeat:
    """Detects lost processes by counters that every process increments in a shared store.

    The heartbeat is needed because a collective operation waits forever for a lost process, and
    Python cannot interrupt it.

    Args:
        store: A store of ``torch.distributed``.
        rank: Rank of this process.
        size: Number of processes.
    """

    store: Any
    rank: int
    size: int
    waiting_since: float | None = None
    """Monotonic time in seconds at which this process entered its current collective operation;
    None outside of collective operations."""
    lost: bool = False
    """Whether another process is lost."""
    _beats: int = 0
    _counters: dict[int, tuple[bytes, float]] = field(default_factory=dict)
    """Rank -> (last counter of the process with this rank, time at which it was first read)."""

    def beat_and_check_others(self, now: float) -> None:
        """Increment the counter of this process, and update ``lost`` from the other counters.

        Args:
            now: Current time of a monotonic clock, in seconds.
        """
        self._beats += 1
        with contextlib.suppress(RuntimeError):  # the process that runs the store is lost
            self.store.set(f"beats/{self.rank}", str(self._beats))
        for rank in set(range(self.size)) - {self.rank}:
            last, since = self._counters.setdefault(rank, (b"", now))
            counter = self._read_counter(rank)
            if counter != last:
                last, since = self._counters[rank] = (counter, now)
            self.lost |= now - since > HEARTBEAT_TIMEOUT_SECONDS

    def must_end(self, now: float) -> bool:
        """Return whether a process is lost and this process waits for it.

        Waiting means that the current collective operation takes longer than `HEARTBEAT_SECONDS`.
        """
        waiting = self.waiting_since is not None and now - self.waiting_since > HEARTBEAT_SECONDS
        return self.lost and waiting

    def _read_counter(self, rank: int) -> bytes:
        """Return the counter of another process, or its last known value if the store is lost."""
        key = f"beats/{rank}"
        try:
            return self.store.get(key) if self.store.check([key]) else b""
        except RuntimeError:
            return self._counters[rank][0]

    def run(self) -> None:
        """Send heartbeats until this process ends.

        If another process is lost and this process waits for it, end this process with exit code 2.
        """
        while not self.must_end(time.monotonic()):
            self.beat_and_check_others(time.monotonic())
            time.sleep(HEARTBEAT_SECONDS)
        print(f"rlhf: {LOST_PROCESS_MESSAGE}", file=sys.stderr, flush=True)
        end_process(2)  # the main thread does not return from the collective operation


@dataclass(frozen=True)
class World:
    """The group of processes that train together.

    Every process must call the methods that communicate, in the same order.
    """

    rank: int = 0
    size: int = 1
    heartbeat: Heartbeat | None = None
    sharded_model: bool = False
    """Whether forward and backward passes are collective operations, because the weights of the
    model are sharded."""

    def map(
        self, items: Sequence[Item], function: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        """Apply a function to a slice of the items in each process, and concatenate the results.

        Each process computes a contiguous slice. Every process gets all results, in the order of
        the items. With several processes, the function is not called for an empty slice.

        Args:
            items: The items, equal in all processes.
            function: Maps a sequence of items to a list of results, which may be shorter.
        """
        if self.size == 1:
            return function(items)
        bounds = [len(items) * rank // self.size for rank in range(self.size + 1)]
        shard = items[bounds[self.rank] : bounds[self.rank + 1]]
        results = function(shard) if shard else []
        return [result for rank_results in self.gather(results) for result in rank_results]

    def items_of_this_process(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of the items: every ``size``-th, from index ``rank`` on."""
        return items[self.rank :: self.size]

    def own_micro_batches_with_weights(self, items: Sequence[Item]) -> Iterator[tuple[Item, float]]:
        """Yield this process's part of the micro-batches, each with the weight 1.

        If the model is sharded, all processes must make the same number of passes. A process with
        fewer micro-batches then also gets the one with the fewest rows, with weight 0.

        Args:
            items: Indices of the rows of each micro-batch, equal in all processes.
        """
        with self.lost_process_guard():
            part = self.items_of_this_process(items)
            yield from ((item, 1.0) for item in part)
            if self.sharded_model and len(part) * self.size < len(items):
                yield min(items, key=len), 0.0  # type: ignore[arg-type]

    @contextlib.contextmanager
    def lost_process_guard(self) -> Iterator[None]:
        """Return a context manager for forward and backward passes.

        If the model is sharded and another process is lost, this process ends within it.

        Raises:
            UserError: The model is sharded, and another process was lost before.
        """
        if not self.sharded_model or self.heartbeat is None:
            yield
            return
        if self.heartbeat.lost:
            raise UserError(LOST_PROCESS_MESSAGE)
        before = self.heartbeat.waiting_since
        self.heartbeat.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.heartbeat.waiting_since = before

    def gather(self, value: Any) -> list[Any]:
        """Return the list of the values of all processes, in order of their rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._collective_operation():
            distributed.all_gather_object(values, value)
        return values

    def sum_metrics(self, metrics: MetricSums) -> MetricSums:
        """Return the sum of the metrics of all processes."""
        if self.size == 1:
            return metrics
        # A tensor on a GPU would be received on the GPU of the process that sent it.
        return sum(self.gather(metrics.on_cpu()), MetricSums())

    def first_not_none(self, value: Any) -> Any:
        """Return the first value, by rank, that is not None; None if every value is None."""
        return next((value for value in self.gather(value) if value is not None), None)

    def barrier(self) -> None:
        """Wait until every process has called this method."""
        if self.size > 1:
            with self._collective_operation():
                distributed.barrier()

    def barrier_if_sharded(self) -> None:
        """Wait until every process has called this method, if the model is sharded."""
        if self.sharded_model:
            self.barrier()

    def all_reduce(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the processes."""
        if self.size > 1:
            with self._collective_operation():
                for tensor in tensors:
                    distributed.all_reduce(tensor)

    def all_reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over the processes; a missing gradient counts as zero.

        The gradients of sharded parameters are already sums.
        """
        if self.size == 1:
            return
        parameters = [parameter for parameter in parameters if not is_sharded(parameter)]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.all_reduce(parameter.grad for parameter in parameters if parameter.grad is not None)

    @contextlib.contextmanager
    def _collective_operation(self) -> Iterator[None]:
        """Return a context manager for a collective operation.

        It records when this process began to wait, and converts connection errors.

        Raises:
            UserError: Another process is lost, before or during the operation.
        """
        heartbeat = self.heartbeat
        if heartbeat is None:
            yield
            return
        if heartbeat.lost:
            raise UserError(LOST_PROCESS_MESSAGE)
        before, heartbeat.waiting_since = heartbeat.waiting_since, time.monotonic()
        try:
            yield
        except RuntimeError as error:  # gloo: the connection is closed
            raise UserError(f"{LOST_PROCESS_MESSAGE} ({first_line(error)})") from error
        finally:
            heartbeat.waiting_since = before


@contextlib.contextmanager
def lost_process_as_user_error() -> Iterator[None]:
    """Return a context manager that converts errors of connections to lost processes.

    FSDP and distributed checkpoints communicate outside of the methods of `World`.

    Raises:
        UserError: The connection to another process is closed.
    """
    try:
        yield
    except RuntimeError as error:
        text = first_line(error)
        if isinstance(error, distributed.DistError) or "gloo" in text:
            raise UserError(f"{LOST_PROCESS_MESSAGE} ({text})") from error
        raise


def prepare_for_sharding(config: Any) -> bool:
    """Return whether a run shards its model, and prepare this process for it.

    With one process, the model is not sharded.

    Args:
        config: Configuration of a training command.
    """
    if config.sharding == "none" or init_distributed().size == 1:
        return False
    configure_malloc_to_return_memory()
    return True


def init_distributed() -> World:
    """Initialize the process group from the launcher's environment variables, and return a `World`.

    Without a launcher, the group has only this process.

    Raises:
        UserError: Another process did not start.
    """
    size = launcher_number("WORLD_SIZE")
    if size == 1:
        return World()
    if not distributed.is_initialized():
        _join_group("nccl" if torch.cuda.is_available() else "gloo")
        # The group must be destroyed before the interpreter shuts down, because the threads of the
        # group can abort the process during the shutdown.
        atexit.register(distributed.destroy_process_group)
    return World(distributed.get_rank(), size, _start_heartbeat(distributed.get_rank(), size))


def _join_group(backend: str) -> None:
    """Initialize the process group when all processes have started.

    By default, a process would wait for half an hour for one that ended before it joined.

    Raises:
        UserError: A process did not start within `START_TIMEOUT_SECONDS`.
    """
    limit = timedelta(seconds=START_TIMEOUT_SECONDS)
    device = default_device()
    if device.type == "cuda":  # collective operations use the current device
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=limit))
        store.set(f"started/{rank}", "")
        store.wait([f"started/{other}" for other in range(size)], limit)
    except distributed.DistError as error:
        raise UserError(
            "the other processes of this run did not start within "
            f"{START_TIMEOUT_SECONDS:g} s, or ended"
        ) from error
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


@functools.cache
def _start_heartbeat(rank: int, size: int) -> Heartbeat:
    """Start the heartbeat thread of this process; later calls return the same heartbeat.

    The thread has a separate connection to the store.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=HEARTBEAT_TIMEOUT_SECONDS)
    store = distributed.TCPStore(host, port, is_master=False, timeout=limit)
    heartbeat = Heartbeat(store, rank, size)
    threading.Thread(target=heartbeat.run, daemon=True).start()
    return heartbeat
