"""Run the jobs of a study as tasks of a Ray cluster, or of Ray on this machine.

The processes of the cluster must see the directories of the study and of its inputs under the same
paths, and have the toolkit installed.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rlhf.commands.command import CommandTable
from rlhf.common.imports import check_extra_installed
from rlhf.config.launcher import LauncherConfig
from rlhf.errors import UserError, first_line
from rlhf.runs.interrupt import StopSignalRecorder
from rlhf.studies.jobs import Job
from rlhf.studies.launchers.base import FutureLauncher

CONNECT_SECONDS = 10.0
"""Time limit of a connection to the address of a cluster."""


class RayLauncher(FutureLauncher):
    """Launcher that submits each job as a task of Ray.

    Raises:
        UserError: Ray is not installed.
    """

    def __init__(self, config: LauncherConfig, commands: CommandTable, root: Path) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray would otherwise set CUDA_VISIBLE_DEVICES to nothing in tasks that reserve no GPU.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        check_extra_installed("--launcher ray", "ray", "ray")
        import ray

        self.ray: Any = ray
        self.capacity = config.jobs
        self.config = config
        self.logs = (root / "logs").resolve()
        self.stop = StopSignalRecorder(raise_at_once_for=root)
        self._task: Any = None
        self._commands: Any = commands
        self._references: dict[Future[str | None], Any] = {}
        self._started_ray = False

    def __enter__(self) -> RayLauncher:
        ray = self.ray
        if not ray.is_initialized():
            address = self.config.ray_address or os.environ.get("RAY_ADDRESS", "")
            _check_cluster_answers(address)
            # The dashboard can be disabled only in a cluster that this process starts.
            options = {} if address else {"include_dashboard": False}
            try:
                ray.init(
                    address=address or None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **options,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"ray_address: {first_line(error)}") from error
            self._started_ray = True
        try:
            self._check_resources()
        except UserError:
            self._shut_down()
            raise
        # Ray must not repeat a task: --resume continues an interrupted job from its checkpoint.
        self._task = ray.remote(
            num_cpus=self.config.cpus_per_job or 1,
            num_gpus=self.config.gpus_per_job or 0,
            max_retries=0,
        )(_run_task)
        self._commands = ray.put(self._commands)
        self.stop.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        references = list(self._references.values())
        for reference in references:  # after a signal or an error
            self.ray.cancel(reference)  # the task receives SIGINT and saves a checkpoint
        if references:
            self.ray.wait(references, num_returns=len(references))
        self.stop.__exit__()
        self._shut_down()

    def _shut_down(self) -> None:
        """Disconnect from the cluster, if this launcher connected to it."""
        if self._started_ray:
            self.ray.shutdown()

    def _check_resources(self) -> None:
        """Raise UserError if no machine of the cluster has the resources of a job."""
        needed = {"CPU": self.config.cpus_per_job or 1, "GPU": self.config.gpus_per_job or 0}
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if not any(
            all(machine.get(name, 0) >= count for name, count in needed.items())
            for machine in machines
        ):
            raise UserError(
                f"no machine of the Ray cluster has {needed['CPU']} CPUs and {needed['GPU']} GPUs; "
                "reduce cpus_per_job or gpus_per_job"
            )

    def submit(self, job: Job) -> Future[str | None]:
        """Submit a job as a task; see `FutureLauncher.submit`."""
        threads = self.config.cpus_per_job or 1
        reference = self._task.options(name=job.key).remote(
            job, self._commands, os.getcwd(), self.logs, threads
        )
        future = reference.future()
        self._references[future] = reference
        return future

    def error_message(self, future: Future[str | None]) -> str | None:
        """Return the error message of a job; see `FutureLauncher.error_message`."""
        del self._references[future]
        errors = self.ray.exceptions
        try:
            return future.result()
        except errors.RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except errors.RayError as error:
            return (
                f"its process ended, perhaps because memory was exhausted ({first_line(error)}); "
                f"see {self.logs}"
            )


def _check_cluster_answers(address: str) -> None:
    """Check that a program answers at an address ``host:port``; Ray would wait for minutes.

    An address of another form, such as ``auto``, is not checked.

    Raises:
        UserError: No program answers.
    """
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"ray_address or RAY_ADDRESS: no Ray cluster answers at {address} ({error})"
        ) from error


def _run_task(
    job: Job, commands: CommandTable, directory: str, logs: Path, threads: int
) -> str | None:
    """Run a job in a worker process of Ray.

    Args:
        job: The job, whose paths may be relative to `directory`.
        commands: Commands of the jobs.
        directory: Working directory of the study.
        logs: Folder of the output files.
        threads: Maximum number of threads of torch.

    Returns:
        The error message of the job, or None if the job succeeded.
    """
    from rlhf.studies.launchers.worker import run_job_and_return_error

    try:
        os.chdir(directory)
    except OSError as error:
        return f"the machine has no folder {directory} ({error.strerror}): use a shared disk"
    _initialize_ray_worker(logs, threads)
    return run_job_and_return_error(job, commands)


@functools.cache
def _initialize_ray_worker(logs: Path, threads: int) -> None:
    """Initialize this worker process at its first job."""
    from rlhf.studies.launchers.worker import initialize_worker

    initialize_worker(logs, threads)
