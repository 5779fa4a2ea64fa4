"""Run a rollout engine in a thread, and give it the requests of many clients.

Only this thread calls the engine and the model. Between two forward passes, it takes new requests,
cancels requests whose clients have disconnected, and passes new tokens to the event loop of the
server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.rollout.sampling.base import (
    Completion,
    FinishReason,
    IncrementalEngine,
    NewTokens,
    Request,
    RolloutEngine,
    SamplingParams,
)
from rlhf.runs.launch import collect_garbage_and_trim_heap
from rlhf.serving.engine_thread import EngineThread

log = logging.getLogger(__name__)

PREFILL_SHARE = 1 / 8
"""New requests are submitted immediately if their number is at least this fraction of the number of
running requests. Fewer requests wait, because even a small prefill takes as long as a decoding
step."""
MAX_SKIPPED_POLLS = 4
"""Maximum number of polls for which fewer new requests wait for further requests."""
PREFILL_TOKENS = 8192
"""Maximum number of tokens, including padding, in a batch of several new prompts. It limits the
memory of a prefill and the time for which other requests wait."""
IDLE_SECONDS = 30.0
"""Time without requests after which the engine frees its cache."""

_episode_ids = itertools.count()


class Overloaded(Exception):
    """The queue is full.

    Args:
        retry_seconds: Time after which the queue probably has room again.
    """

    def __init__(self, retry_seconds: int) -> None:
        super().__init__("too many requests wait for the model")
        self.retry_seconds = retry_seconds


class EngineFailed(Exception):
    """The engine failed while it sampled a completion, or cannot be used any more."""


@dataclass(frozen=True)
class Progress:
    """New tokens of a job. A job ends with a finish reason or an error."""

    job: Job
    new_tokens: NewTokens
    finish_reason: FinishReason | None = None
    error: EngineFailed | None = None

    @property
    def is_last(self) -> bool:
        """Whether the job has ended."""
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """A completion to sample for a client."""

    request: Request
    incremental: bool
    """Whether tokens are needed before the completion ends."""
    deliver: Callable[[Progress], None]
    """Receives the progress of the job, in the event loop."""
    num_delivered: int = 0
    """Number of tokens that were delivered. Only the thread of the engine uses it."""
    ended: bool = False
    """Whether the job ended or was canceled. Only the event loop uses it."""
    submitted: float = field(default_factory=time.monotonic)

    @classmethod
    def with_new_episode(
        cls,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
        seed: tuple[int, ...],
        num_alternatives: int,
        incremental: bool,
        deliver: Callable[[Progress], None],
    ) -> Job:
        """Return a job with a new episode of one turn."""
        request = Request(
            next(_episode_ids),
            prompt_ids,
            max_new_tokens,
            seed,
            sampling,
            num_alternatives=num_alternatives,
        )
        return cls(request, incremental, deliver)


class Scheduler:
    """Runs an engine in its own thread, and submits requests to it.

    The public methods are called in the event loop.

    Args:
        engine: The engine. An `IncrementalEngine` also delivers unfinished completions.
        max_running: Maximum number of completions that the engine samples at once.
        max_waiting: Maximum number of completions that wait.
        thread: The thread in which the model was loaded; by default, a new thread.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        *,
        max_running: int,
        max_waiting: int,
        thread: EngineThread | None = None,
    ) -> None:
        self.engine = engine
        self._incremental = engine if isinstance(engine, IncrementalEngine) else None
        self.capacity, self.max_running = max_running + max_waiting, max_running
        self.failure: Exception | None = None
        """The error that made the engine unusable."""
        self.num_unfinished = 0
        """Number of completions and calls that have not ended."""
        self._mean_seconds = 1.0  # running mean of the time from the submission to the end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # The following attributes belong to the thread of the engine.
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}  # by episode id
        self._calls: deque[Callable[[], None]] = deque()
        self._skipped_polls = 0
        self._closed = self._used = False
        self._thread = thread or EngineThread()
        self._end_of_thread = self._thread.start(self._run)

    @property
    def is_incremental(self) -> bool:
        """Whether the engine delivers tokens before a completion ends."""
        return self._incremental is not None

    @property
    def num_running(self) -> int:
        """Number of completions that the engine samples."""
        return len(self._running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, either all or none.

        Raises:
            Overloaded: There are too many unfinished jobs.
            EngineFailed: The engine cannot be used.
        """
        self._check_room(len(jobs))
        self._loop = asyncio.get_running_loop()
        self.num_unfinished += len(jobs)
        self._commands.put(lambda: self._waiting.extend(jobs))

    def cancel(self, job: Job) -> None:
        """End a job that is not needed any more; no further progress is delivered."""
        if not job.ended:
            job.ended = True
            self.num_unfinished -= 1
            self._commands.put(lambda: self._drop_job(job))

    async def call_in_engine_thread(self, function: Callable[[], Any]) -> Any:
        """Call a function in the thread of the engine, between two forward passes.

        Returns:
            The result of the function. An exception of the function is raised.

        Raises:
            Overloaded: There are too many unfinished jobs.
            EngineFailed: The engine cannot be used.
        """
        self._check_room(1)
        loop = self._loop = asyncio.get_running_loop()
        future = loop.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                result, error = function(), None
            except Exception as raised:
                result, error = None, raised
            self._call_in_loop(_set_result_or_exception, future, result, error)

        self._commands.put(lambda: self._calls.append(run))
        self.num_unfinished += 1
        try:
            return await future
        finally:
            self.num_unfinished -= 1

    def close(self) -> None:
        """End the thread, wait for its end, and abandon unfinished jobs."""

        def end() -> None:
            self._closed = True

        self._commands.put(end)
        self._thread.close()
        self._end_of_thread.result()

    def _check_room(self, count: int) -> None:
        """Raise Overloaded or EngineFailed if `count` further jobs cannot be queued."""
        if self.failure is not None:
            raise EngineFailed("the model cannot be used any more") from self.failure
        if self.num_unfinished + count > self.capacity:
            rounds = self.num_unfinished / self.max_running
            raise Overloaded(min(60, max(1, math.ceil(rounds * self._mean_seconds))))

    # -- thread of the engine -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._run_commands()
                if self._calls:
                    self._calls.popleft()()
                self._submit_waiting()
                if self._running:
                    self._poll()
        except Exception as error:  # requests must not wait for a thread that has ended
            log.exception("the engine cannot be used any more")
            self.failure = error
            self._fail_all_jobs(error)

    def _run_commands(self) -> None:
        """Run the commands of the event loop; wait for one if there is nothing else to do.

        After `IDLE_SECONDS` without a command, the cache of the engine is freed.
        """
        if not (self._waiting or self._running or self._calls):
            try:
                self._commands.get(timeout=IDLE_SECONDS if self._used else None)()
            except queue.Empty:
                self.engine.reset()
                collect_garbage_and_trim_heap()
                self._used = False
                return
        while not self._commands.empty():
            self._commands.get()()

    def _submit_waiting(self) -> None:
        """Submit the waiting jobs that the engine can start now.

        Few jobs first wait for others (see `PREFILL_SHARE`).
        """
        free = self.max_running - len(self._running)
        if not self._waiting or not free:
            return
        few = len(self._waiting) < PREFILL_SHARE * len(self._running)
        if few and self._skipped_polls < MAX_SKIPPED_POLLS:
            self._skipped_polls += 1
            return
        self._skipped_polls, longest = 0, 0
        jobs: list[Job] = []
        while self._waiting and len(jobs) < free:
            longest = max(longest, len(self._waiting[0].request.prompt_ids))
            if jobs and longest * (len(jobs) + 1) > PREFILL_TOKENS:
                break
            jobs.append(self._waiting.popleft())
        self._running |= {job.request.episode_id: job for job in jobs}
        self._used = True
        self.engine.submit([job.request for job in jobs])

    def _poll(self) -> None:
        """Run the engine, and deliver new tokens. After an error, all running jobs fail."""
        try:
            completions = self.engine.poll()
        except Exception as error:
            log.warning("a forward pass failed: %s", error, exc_info=error)
            self.engine.reset()
            self._fail_running_jobs(error)
            return
        progress = [self._finish(completion) for completion in completions]
        if self._incremental is not None:
            for episode_id, job in self._running.items():
                if job.incremental:
                    new = self._incremental.new_tokens(episode_id, job.num_delivered)
                    job.num_delivered += len(new.tokens)
                    progress.append(Progress(job, new))
        if progress:
            self._call_in_loop(self._deliver_progress, progress)

    def _finish(self, completion: Completion) -> Progress:
        """Release the cache row of a completion; return the tokens that were not delivered yet."""
        episode_id = completion.request.episode_id
        job = self._running.pop(episode_id)
        self.engine.release(episode_id)
        start = job.num_delivered
        new = NewTokens(
            completion.tokens[start:], completion.logprobs[start:], completion.alternatives[start:]
        )
        return Progress(job, new, completion.finish_reason)

    def _drop_job(self, job: Job) -> None:
        episode_id = job.request.episode_id
        if self._running.pop(episode_id, None) is not None:
            self.engine.release(episode_id)
        elif job in self._waiting:
            self._waiting.remove(job)

    def _fail_running_jobs(self, error: Exception) -> None:
        failure = EngineFailed(f"the engine failed: {type(error).__name__}")
        failure.__cause__ = error
        nothing = NewTokens([], [], [])
        progress = [Progress(job, nothing, error=failure) for job in self._running.values()]
        self._running.clear()
        self._call_in_loop(self._deliver_progress, progress)

    def _fail_all_jobs(self, error: Exception) -> None:
        while not self._commands.empty():
            self._commands.get()()
        self._running |= {job.request.episode_id: job for job in self._waiting}
        self._waiting.clear()
        self._fail_running_jobs(error)
        while self._calls:
            self._calls.popleft()()

    def _call_in_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the event loop. After the end of the server, do nothing."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(function, *arguments)

    # -- event loop ---------------------------------------------------------------------------

    def _deliver_progress(self, progress: Sequence[Progress]) -> None:
        for item in progress:
            job = item.job
            if job.ended:
                continue
            if item.is_last:
                job.ended = True
                self.num_unfinished -= 1
                seconds = time.monotonic() - job.submitted
                self._mean_seconds += (seconds - self._mean_seconds) / 16
            job.deliver(item)


def _set_result_or_exception(
    future: asyncio.Future[Any], result: Any, error: Exception | None
) -> None:
    """Set the result or the exception of a future, unless its task was canceled."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
