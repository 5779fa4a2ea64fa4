"""Run jobs in reused worker processes, so that each process imports torch only once."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.commands.command import CommandTable
from rlhf.common.text import set_up_logging
from rlhf.errors import UserError
from rlhf.runs import launch
from rlhf.runs.directory import KEYS_FREE_ON_RESUME, check_unchanged_configuration, open_directory
from rlhf.runs.progress import ProgressDisplay
from rlhf.studies.bench.plan import Job

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_study(
    root: Path, name: str, config: Any, commands: CommandTable, jobs: Iterable[Job] = ()
) -> Iterator[None]:
    """Return a context that locks a study's directory, and write its configuration.

    Raises:
        UserError: the directory exists, or one of its jobs had another configuration.
    """
    for command, stage in (stage for job in jobs for stage in job.stages):
        directory = Path(stage["output_dir"])
        if config.resume and not config.overwrite and (directory / "config.yaml").exists():
            settings = commands.configure(command, stage)
            check_unchanged_configuration(directory, commands.effective_tree(command, settings))
    tree = {key: value for key, value in asdict(config).items() if key not in KEYS_FREE_ON_RESUME}
    with open_directory(root, name, tree, resume=config.resume, overwrite=config.overwrite):
        yield


def run_job(job: Job, commands: CommandTable) -> None:
    """Run the unfinished stages of a job in this process."""
    for command, tree in job.stages:
        commands.run_command(command, tree)
        # Delete the optimizer state of a finished run, because it is most of the run's size.
        shutil.rmtree(Path(tree["output_dir"]) / "checkpoints", ignore_errors=True)
        launch.release_memory()


def _attempt(job: Job, commands: CommandTable) -> str | None:
    """Run a job in a worker; return the error message of a user's mistake, None if it succeeded.

    Raises:
        RuntimeError: Any other exception, as text: the pool breaks on an exception that cannot be
            pickled, such as those of user code.
    """
    try:
        run_job(job, commands)
    except ValueError as error:  # includes UserError
        return " ".join(str(error).split())
    except Exception:
        raise RuntimeError(f"{job.key}: {traceback.format_exc()}") from None
    return None


class Workers:
    """`count` worker processes as a context manager; each writes its output to a file in `logs`."""

    def __init__(self, count: int, commands: CommandTable, *, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = logs
        self.commands = commands
        self.pool = ProcessPoolExecutor(
            count,
            # A forked copy of a process with threads may hang.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare,
            initargs=(logs, max(1, (os.cpu_count() or 1) // count)),
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def run_jobs(self, jobs: Sequence[Job], title: str) -> dict[str, str]:
        """Run every job after the job that it depends on; `title` is for the progress display.

        Returns:
            Error messages by key of the failed jobs, including jobs that depend on a failed one.

        Raises:
            UserError: a process died; finished runs are kept.
        """
        waiting = {job.key: job for job in jobs}
        done: set[str] = {job.after for job in jobs if job.after} - waiting.keys()
        failed: dict[str, str] = {}
        running: dict[Future[str | None], str] = {}
        with ProgressDisplay(title, len(jobs)) as bar:
            while waiting or running:
                ready = [job for job in waiting.values() if job.after is None or job.after in done]
                for job in ready:
                    del waiting[job.key]
                    running[self.pool.submit(_attempt, job, self.commands)] = job.key
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key = running.pop(future)
                    if reason := self._reason(future):
                        dependent = [job.key for job in waiting.values() if job.after == key]
                        failed |= {key: reason} | {name: f"{key} failed" for name in dependent}
                        for name in dependent:
                            del waiting[name]
                    else:
                        done.add(key)
                bar.show(len(done & {job.key for job in jobs}) + len(failed), {})
        return failed

    def _reason(self, future: Future[str | None]) -> str | None:
        """Return the error message of a job; None if it succeeded."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a process of the benchmark died (out of memory?): see {self.logs}, use fewer "
                "--jobs, and continue with --resume"
            ) from error


def _prepare(logs: Path, threads: int) -> None:
    """Initialize a worker process: output file, number of threads, termination with its parent."""
    with (logs / f"{os.getpid()}.log").open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    launch.prepare()
    import torch

    # By default torch uses as many threads as there are cores in every process.
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    set_up_logging(logging.INFO)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Terminate the worker when its parent dies; otherwise it would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
