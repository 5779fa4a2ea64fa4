"""Run the jobs of a study in processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rlhf.commands.command import CommandTable
from rlhf.common.worker_process import SpawnContextWithoutUserScript, end_with_parent
from rlhf.config.launcher import LauncherConfig
from rlhf.runs.interrupt import StopSignalRecorder
from rlhf.studies.jobs import Job, JobsFailedError
from rlhf.studies.launchers.base import FutureLauncher
from rlhf.studies.launchers.worker import initialize_worker, run_job_and_return_error


class LocalLauncher(FutureLauncher):
    """Launcher with `jobs` worker processes on this machine, which are reused."""

    def __init__(self, config: LauncherConfig, commands: CommandTable, root: Path) -> None:
        jobs = config.jobs or 1
        self.capacity = jobs
        self.commands = commands
        self.logs = root / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.stop = StopSignalRecorder(raise_at_once_for=root)
        threads = config.cpus_per_job or max(1, (os.cpu_count() or 1) // jobs)
        self.pool = ProcessPoolExecutor(
            jobs,
            # A forked copy of a process with threads may hang.
            mp_context=SpawnContextWithoutUserScript(),
            initializer=_initialize_local_worker,
            initargs=(self.logs, threads),
        )

    def __enter__(self) -> LocalLauncher:
        self.stop.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.stop.number is not None:  # the sender may have signaled only this process
            for process in multiprocessing.active_children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid or 0, self.stop.number)
        self.pool.shutdown(cancel_futures=True)
        self.stop.__exit__()

    def submit(self, job: Job) -> Future[str | None]:
        """Start a job in a free worker process; see `FutureLauncher.submit`."""
        return self.pool.submit(run_job_and_return_error, job, self.commands)

    def error_message(self, future: Future[str | None]) -> str | None:
        """Return the error message of a job; see `FutureLauncher.error_message`."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise JobsFailedError(
                f"a worker process died, perhaps because memory was exhausted: see {self.logs}; "
                "continue with --resume and fewer --jobs"
            ) from error


def _initialize_local_worker(logs: Path, threads: int) -> None:
    """Initialize a worker process, which ends when its parent does."""
    initialize_worker(logs, threads)
    end_with_parent()
