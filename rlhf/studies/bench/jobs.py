"""Run the jobs of a study in worker processes that are reused, so that each imports torch once."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.commands.command import CommandTable
from rlhf.common.text import set_up_logging
from rlhf.common.worker_process import end_with_parent
from rlhf.errors import UserError
from rlhf.runs import launch
from rlhf.runs.directory import KEYS_FREE_ON_RESUME, lock_directory
from rlhf.runs.interrupt import StopSignalRecorder
from rlhf.runs.progress import ProgressDisplay
from rlhf.studies.bench.plan import Job

log = logging.getLogger(__name__)


def study_config_without_directory_keys(config: Any) -> dict[str, Any]:
    """Return the configuration of a study as plain data, without the keys of its directory."""
    return {key: value for key, value in asdict(config).items() if key not in KEYS_FREE_ON_RESUME}


@contextlib.contextmanager
def lock_study_directory(
    root: Path, config_file_name: str, config: Any, commands: CommandTable, jobs: Iterable[Job] = ()
) -> Iterator[None]:
    """Return a context manager that locks a study's directory and writes its configuration.

    Args:
        root: Directory of the study.
        config_file_name: Name of the configuration file.
        config: Configuration with `resume` and `overwrite`.
        commands: Commands of the jobs.
        jobs: Jobs whose stored configurations are compared with the current ones when resuming.

    Raises:
        UserError: The directory exists and neither `resume` nor `overwrite` is set, or a stage was
            started with a different configuration.
    """
    if config.resume and not config.overwrite:
        for command, stage in (stage for job in jobs for stage in job.stages):
            commands.check_resumable(command, stage)
    tree = study_config_without_directory_keys(config)
    with lock_directory(
        root, config_file_name, tree, resume=config.resume, overwrite=config.overwrite
    ):
        yield


def run_job(job: Job, commands: CommandTable) -> None:
    """Run the unfinished stages of a job in this process, and delete their checkpoints."""
    for command, tree in job.stages:
        commands.run_command(command, tree)
        # Delete the optimizer state of a finished run, because it is most of the run's size.
        shutil.rmtree(Path(tree["output_dir"]) / "checkpoints", ignore_errors=True)
        launch.release_memory()


def _run_in_worker(job: Job, commands: CommandTable) -> str | None:
    """Run a job in a worker process.

    Returns:
        The message of a ValueError (UserError is one), or None if the job succeeded.

    Raises:
        RuntimeError: The job raised another exception. Its traceback is the message. The exception
            itself is not passed on, because the process pool fails if an exception cannot be
            pickled.
    """
    try:
        run_job(job, commands)
    except ValueError as error:  # includes UserError
        return " ".join(str(error).split())
    except Exception:
        raise RuntimeError(f"{job.key}: {traceback.format_exc()}") from None
    return None


class WorkerPool:
    """Context manager of `count` worker processes.

    Each process writes its output to the file `<process id>.log` in the directory `logs`. After a
    signal, the processes save a checkpoint and end, and `run_jobs` raises Interrupted.
    """

    def __init__(self, count: int, commands: CommandTable, *, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.count = count
        self.logs = logs
        self.commands = commands
        self.stop = StopSignalRecorder(raise_for=logs.parent)
        self.pool = ProcessPoolExecutor(
            count,
            # A forked copy of a process with threads may hang.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_initialize_worker,
            initargs=(logs, max(1, (os.cpu_count() or 1) // count)),
        )

    def __enter__(self) -> WorkerPool:
        self.stop.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.stop.number is not None:  # the sender may have signaled only this process
            for process in multiprocessing.active_children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid or 0, self.stop.number)
        self.pool.shutdown(cancel_futures=True)
        self.stop.__exit__()

    def run_jobs(self, jobs: Sequence[Job], title: str) -> dict[str, str]:
        """Run all jobs in parallel, each after the job that it depends on.

        A job that another job depends on, and that is not in `jobs`, counts as finished.

        Args:
            jobs: Jobs to run.
            title: Title of the progress display.

        Returns:
            Key of each failed job -> error message. Jobs that depend on a failed job are not run
            and count as failed.

        Raises:
            UserError: A worker process died; finished runs are kept.
        """
        waiting = {job.key: job for job in jobs}
        done: set[str] = {job.after for job in jobs if job.after} - waiting.keys()
        failed: dict[str, str] = {}
        running: dict[Future[str | None], str] = {}
        with ProgressDisplay(title, len(jobs)) as bar:
            while waiting or running:
                ready = [job for job in waiting.values() if job.after is None or job.after in done]
                # A job that waits in the pool's queue would still run after a signal.
                for job in ready[: self.count - len(running)]:
                    del waiting[job.key]
                    running[self.pool.submit(_run_in_worker, job, self.commands)] = job.key
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key = running.pop(future)
                    if reason := self._error_message(future):
                        dependent = [job.key for job in waiting.values() if job.after == key]
                        failed |= {key: reason} | {name: f"{key} failed" for name in dependent}
                        for name in dependent:
                            del waiting[name]
                    else:
                        done.add(key)
                bar.show(len(done & {job.key for job in jobs}) + len(failed), {})
        return failed

    def _error_message(self, future: Future[str | None]) -> str | None:
        """Return the error message of a job, or None if it succeeded."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a worker process died, perhaps because memory was exhausted: see {self.logs}; "
                "continue with --resume and fewer --jobs"
            ) from error


def _initialize_worker(logs: Path, threads: int) -> None:
    """Initialize a worker process.

    Its output is redirected to a file in `logs`, torch uses `threads` threads, and the process
    terminates when its parent does.
    """
    with (logs / f"{os.getpid()}.log").open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    launch.prepare_process()
    import torch

    # By default every process uses as many threads as the machine has cores.
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    set_up_logging(logging.INFO)
    end_with_parent()
