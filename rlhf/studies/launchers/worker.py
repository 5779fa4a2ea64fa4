"""Run jobs in a worker process of a launcher. A worker runs many jobs and imports torch once."""

from __future__ import annotations

import logging
import os
import platform
import sys
import traceback
from pathlib import Path

from rlhf.commands.command import CommandTable
from rlhf.common.files import describe_write_error, find_write_error
from rlhf.common.plugins import load_plugins_of_parent
from rlhf.common.text import set_up_logging
from rlhf.runs import launch
from rlhf.runs.interrupt import Interrupted
from rlhf.studies.jobs import Interruption, Job, run_job


def initialize_worker(logs: Path, threads: int) -> None:
    """Redirect the output of this process to a file, and limit the threads of torch.

    The plug-ins of the parent process are loaded.

    Args:
        logs: Folder of the file, whose name contains the host and the process id.
        threads: Maximum number of threads of torch.
    """
    logs.mkdir(parents=True, exist_ok=True)
    name = f"{platform.node() or 'host'}-{os.getpid()}.log"
    with (logs / name).open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    launch.prepare_process()
    import torch

    # By default, every process starts as many threads as the machine has cores.
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    set_up_logging(logging.INFO)
    load_plugins_of_parent()


def run_job_and_return_error(job: Job, commands: CommandTable) -> str | None:
    """Run a job in this process.

    Returns:
        None if the job succeeded; an `Interruption` if a signal or a write error, such as a full
        disk, stopped the job; otherwise the message of a ValueError, such as UserError.

    Raises:
        RuntimeError: The job raised another exception. The message contains its traceback. The
            original exception is not raised, because a launcher fails if an exception cannot be
            pickled.
    """
    try:
        run_job(job, commands)
    except Interrupted as error:
        return Interruption(error)
    except ValueError as error:  # includes UserError
        return " ".join(str(error).split())
    except Exception as error:
        if cause := find_write_error(error):
            path = f"{cause.filename}: " if cause.filename else ""
            return Interruption(f"{path}{describe_write_error(cause)}")
        raise RuntimeError(f"{job.key}: {traceback.format_exc()}") from None
    return None
