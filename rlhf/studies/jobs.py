"""Define the jobs of a study, run one of them, and lock the directory of a study."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.commands.command import CommandTable
from rlhf.common.text import count_text
from rlhf.config.launcher import without_launcher_keys
from rlhf.errors import UserError
from rlhf.runs import launch
from rlhf.runs.changes import KEYS_IGNORED_ON_RESUME
from rlhf.runs.claim import remove_written_files
from rlhf.runs.directory import lock_directory_and_write_config


class JobsFailedError(UserError):
    """Error after which a study keeps its new directory, because the logs show the jobs' errors."""


class Interruption(str):
    """Error message of a job that a signal or a write error, such as a full disk, stopped.

    The configuration is not the reason, so a resumed study can continue the job.
    """


@dataclass(frozen=True)
class Job:
    """Stages that one process runs in order."""

    key: str
    """Name of the job, such as menu/seed0/ppo; unique in a study."""
    stages: tuple[tuple[str, dict[str, Any]], ...]
    """(command, configuration) pairs."""
    after: str | None = None
    """Key of the job that must be finished first."""


def study_config_without_directory_keys(config: Any) -> dict[str, Any]:
    """Return the configuration of a study as plain data, without the keys that may change.

    These are the keys of its directory and of its launcher.
    """
    tree = without_launcher_keys(asdict(config))
    return {key: value for key, value in tree.items() if key not in KEYS_IGNORED_ON_RESUME}


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
        UserError: The directory exists and neither `resume` nor `overwrite` is set, the directory
            is in use or cannot be written, or a stage was started with a different configuration.
    """
    if config.resume and not config.overwrite:
        for command, stage in (stage for job in jobs for stage in job.stages):
            commands.check_run_config_unchanged(command, stage)
    tree = study_config_without_directory_keys(config)
    with lock_directory_and_write_config(
        root, config_file_name, tree, resume=config.resume, overwrite=config.overwrite
    ) as claim:
        try:
            yield
        except JobsFailedError:
            claim.keep_logs_without_result()
            raise


def run_job(job: Job, commands: CommandTable) -> None:
    """Run the unfinished stages of a job in this process, and delete the checkpoints of all."""
    for command, tree in job.stages:
        commands.run_command(command, tree)
        # Delete the optimizer state of a finished run, because it is most of the run's size.
        with contextlib.suppress(OSError):
            remove_written_files(Path(tree["output_dir"]) / "checkpoints")
        launch.collect_garbage_and_trim_heap()


def failed_jobs_text(failed: Mapping[str, str]) -> str:
    """Return the error message of a study some of whose jobs failed.

    Args:
        failed: Key of each failed job -> error message; at least one.
    """
    key, reason = next(iter(failed.items()))
    more = f" (and {count_text(len(failed) - 1, 'more job')} failed)" if len(failed) > 1 else ""
    return f"{key}: {reason}{more}; finished runs are kept; continue with --resume"
