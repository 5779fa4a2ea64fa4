"""Define what a launcher does, and the loop of launchers that submit one job at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol, Self

from rlhf.runs.progress import ProgressDisplay
from rlhf.studies.jobs import Job


class Launcher(Protocol):
    """Context manager that runs jobs.

    After a signal, running jobs save a checkpoint and end, and `run_jobs` raises Interrupted.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def run_jobs(self, jobs: Sequence[Job], title: str) -> dict[str, str]:
        """Run all jobs, each after the job that it depends on.

        A job that another job depends on, and that is not in `jobs`, counts as finished.

        Args:
            jobs: Jobs to run.
            title: Title of the progress display.

        Returns:
            Key of each failed job -> error message. Jobs that depend on a failed job are not run
            and count as failed.

        Raises:
            UserError: The launcher itself failed; finished runs are kept.
            RuntimeError: A job raised an unexpected exception (launchers local and ray).
        """
        ...


class JobQueue:
    """The jobs that have not started, in their order, and the results of those that ended.

    Args:
        jobs: All jobs.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.waiting = {job.key: job for job in jobs}
        self._finished = {job.after for job in jobs if job.after} - self.waiting.keys()
        self._num_outside = len(self._finished)
        self.failed: dict[str, str] = {}
        """Key of each failed job -> error message."""

    @property
    def num_ended(self) -> int:
        """Number of jobs that finished or failed."""
        return len(self._finished) - self._num_outside + len(self.failed)

    def take_ready(self, count: int | None = None) -> list[Job]:
        """Remove and return up to `count` waiting jobs whose dependencies are finished.

        By default, all of these jobs are removed and returned.
        """
        ready = [
            job for job in self.waiting.values() if job.after is None or job.after in self._finished
        ]
        for job in ready[:count]:
            del self.waiting[job.key]
        return ready[:count]

    def record_end(self, key: str, error: str | None) -> None:
        """Record that a job ended; `error` is None if it succeeded.

        The waiting jobs that depend on a failed job are recorded as failed too.
        """
        if error is None:
            self._finished.add(key)
            return
        self.failed[key] = error
        for job in [job for job in self.waiting.values() if job.after == key]:
            del self.waiting[job.key]
            self.record_end(job.key, f"{key} failed")


class FutureLauncher(ABC):
    """Base of launchers that submit one job at a time and receive a future."""

    capacity: int | None
    """Maximum number of submitted jobs that have not ended; None if there is no limit."""

    @abstractmethod
    def submit(self, job: Job) -> Future[str | None]:
        """Start a job; the result of the future is its error message, or None if it succeeded."""

    @abstractmethod
    def error_message(self, future: Future[str | None]) -> str | None:
        """Return the error message of a job that ended, or None if it succeeded.

        Raises:
            UserError: No further jobs can run.
            RuntimeError: The job raised an exception that is not a ValueError, see
                `run_job_and_return_error`.
        """

    def run_jobs(self, jobs: Sequence[Job], title: str) -> dict[str, str]:
        """Run all jobs as described in `Launcher.run_jobs`."""
        queue = JobQueue(jobs)
        running: dict[Future[str | None], str] = {}
        with ProgressDisplay(title, len(jobs)) as bar:
            while queue.waiting or running:
                # More jobs than can run are not submitted, because they would run after a signal.
                free = None if self.capacity is None else self.capacity - len(running)
                for job in queue.take_ready(free):
                    running[self.submit(job)] = job.key
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    queue.record_end(running.pop(future), self.error_message(future))
                bar.show(queue.num_ended, {})
        return queue.failed
