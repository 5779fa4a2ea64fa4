"""Run the jobs of a study in job arrays of Slurm.

Jobs whose dependencies are finished form an array. A task of the array runs a shell script with the
commands of one job, so that a failed job can be repeated by hand. The machines of the cluster must
see the directories of the study and of its inputs under the same paths.
"""

from __future__ import annotations

import itertools
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf.commands.command import CommandTable
from rlhf.common.files import write_text
from rlhf.common.signals import STOP_SIGNALS
from rlhf.common.yaml_text import dump_yaml
from rlhf.config.launcher import LauncherConfig
from rlhf.errors import UserError
from rlhf.runs.interrupt import StopSignalRecorder
from rlhf.runs.progress import ProgressDisplay
from rlhf.studies.jobs import Interruption, Job
from rlhf.studies.launchers.base import JobQueue

MAX_ARRAY_TASKS = 1000
"""Maximum number of tasks of an array. By default, task numbers of Slurm must be below 1001."""
_SIGNAL_CODES = frozenset(str(128 + number) for number in STOP_SIGNALS)
"""Exit codes of commands that a signal stopped."""
POLL_SECONDS = 1.0
"""Interval between two searches for the results of tasks."""

_ARRAY_TEMPLATE = """\
#!/bin/sh
# Submit with: {submit}
folder={folder}
task="$SLURM_ARRAY_TASK_ID"
# A reader must not see an empty file.
trap 'echo $? > "$folder/.$task.exit.rlhf-part"
mv "$folder/.$task.exit.rlhf-part" "$folder/$task.exit"' EXIT
. "$folder/$task.sh"
"""

_RUN_FUNCTION = """\
# Slurm sends some signals to this shell only, such as that of --signal=B:TERM@120. The shell passes
# them on, and waits until the command has saved a checkpoint.
trap 'stop=1; kill -TERM $child 2> /dev/null' TERM INT HUP
run() {
    "$@" &
    child=$!
    [ -z "$stop" ] || kill -TERM $child
    wait $child; code=$?
    while kill -0 $child 2> /dev/null; do wait $child; code=$?; done
    return $code
}
"""


class SlurmLauncher:
    """Launcher that submits arrays with sbatch and waits for them.

    Raises:
        UserError: The commands of Slurm are not installed.
    """

    def __init__(self, config: LauncherConfig, commands: CommandTable, root: Path) -> None:
        del commands  # the tasks use the command line
        for program in ("sbatch", "scancel"):
            if shutil.which(program) is None:
                raise UserError(
                    f"--launcher slurm needs {program}, which was not found: run the study on a "
                    "machine with Slurm's commands, or use --launcher local"
                )
        self.config = config
        self.name = root.resolve().name
        self.logs = (root / "logs").resolve()
        self.stop = StopSignalRecorder(raise_at_once_for=root)

    def __enter__(self) -> SlurmLauncher:
        self.stop.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.__exit__()

    def run_jobs(self, jobs: Sequence[Job], title: str) -> dict[str, str]:
        """Run all jobs as described in `Launcher.run_jobs`."""
        queue = JobQueue(jobs)
        with ProgressDisplay(title, len(jobs)) as bar:
            while array := queue.take_ready(MAX_ARRAY_TASKS):
                self._run_array(array, queue, bar)
        return queue.failed

    def _run_array(self, jobs: Sequence[Job], queue: JobQueue, bar: ProgressDisplay) -> None:
        """Run jobs as one array, and record their results in `queue`.

        Raises:
            UserError: sbatch failed.
            Interrupted: This process received a signal. The tasks have ended.
        """
        folder, command = self._write_array_scripts(jobs)
        running = dict(enumerate(jobs, 1))
        log = folder / "array.log"
        with (
            log.open("w") as file,
            subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # a signal to this process group must not end sbatch
            ) as process,
        ):
            assert process.stderr is not None
            try:
                if not _wait_for_array_id(process, log):
                    raise UserError(f"sbatch failed: {' '.join(process.stderr.read().split())}")
                ended = False
                while not ended:
                    ended = process.poll() is not None
                    for task in [n for n in running if (folder / f"{n}.exit").exists()]:
                        queue.record_end(running.pop(task).key, _task_error(folder, task))
                    bar.show(queue.num_ended, {})
                    time.sleep(0 if ended else POLL_SECONDS)
            except BaseException:
                if array_id := _wait_for_array_id(process, log):
                    _cancel(array_id)
                process.wait()
                raise
        for task, job in running.items():
            queue.record_end(job.key, _task_error(folder, task))

    def _write_array_scripts(self, jobs: Sequence[Job]) -> tuple[Path, list[str]]:
        """Write the scripts of an array into a new folder of the logs.

        Returns:
            The folder, and the command that submits the array.
        """
        folders = (self.logs / f"slurm-{number}" for number in itertools.count(1))
        folder = next(path for path in folders if not path.exists())
        folder.mkdir(parents=True)
        for task, job in enumerate(jobs, 1):
            write_text(folder / f"{task}.sh", _write_configs_and_make_job_script(folder, task, job))
        limit = f"%{self.config.jobs}" if self.config.jobs else ""
        options = [
            f"--job-name={self.name}",
            f"--array=1-{len(jobs)}{limit}",
            f"--output={_escape_pattern(folder)}/%a.log",
            f"--chdir={Path.cwd()}",
            f"--cpus-per-task={self.config.cpus_per_job or 1}",
            *([f"--gpus-per-task={self.config.gpus_per_job}"] if self.config.gpus_per_job else []),
            *self.config.sbatch_options,
        ]
        # The options are not in the script, where Slurm gives quotes and # another meaning.
        command = ["sbatch", "--parsable", "--wait", *options, str(folder / "array.sh")]
        text = _ARRAY_TEMPLATE.format(
            submit=shlex.join(command).replace("\n", " "), folder=shlex.quote(str(folder))
        )
        write_text(folder / "array.sh", text)
        return folder, command


def _write_configs_and_make_job_script(folder: Path, task: int, job: Job) -> str:
    """Write the configurations of a job's stages, and return a shell script with its commands."""
    lines = [f"# {job.key}", _RUN_FUNCTION.rstrip()]
    for number, (command, tree) in enumerate(job.stages, 1):
        config = folder / f"{task}-{number}.yaml"
        write_text(config, dump_yaml(tree))
        words = [sys.executable, "-m", "rlhf", *command.split(), "--config", str(config)]
        checkpoints = Path(tree["output_dir"]).resolve() / "checkpoints"
        lines += [f"run {shlex.join(words)} || exit", f"rm -rf {shlex.quote(str(checkpoints))}"]
    return "\n".join(lines) + "\n"


def _escape_pattern(folder: Path) -> str:
    """Return a path for --output with escaped %, because Slurm replaces patterns such as %j."""
    return str(folder).replace("%", "%%")


def _wait_for_array_id(process: subprocess.Popen[str], log: Path) -> str:
    """Wait until sbatch has printed the id of an array; return the id, or "" if sbatch failed."""
    while "\n" not in (text := log.read_text()) and process.poll() is None:
        time.sleep(POLL_SECONDS / 20)
    return text.partition("\n")[0].partition(";")[0].strip()


def _task_error(folder: Path, task: int) -> str | None:
    """Return the error message of a task that ended, or None if it succeeded.

    The message is an `Interruption` if a signal stopped a command of the task.
    """
    log = folder / f"{task}.log"
    try:
        code = (folder / f"{task}.exit").read_text().strip()
    except FileNotFoundError:
        return f"it was canceled, or exceeded its time or memory limit; see {log}"
    if code == "0":
        return None
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1].removeprefix("rlhf: ") if lines else f"exit code {code}"
    kind = Interruption if code in _SIGNAL_CODES else str
    return kind(f"{last} (see {log})")


def _cancel(array_id: str) -> None:
    """End the tasks of an array: waiting tasks at once, running tasks after a checkpoint."""
    for options in (["--state=PENDING"], ["--state=RUNNING", "--full", "--signal=TERM"]):
        subprocess.run(["scancel", *options, array_id], check=False, capture_output=True)
