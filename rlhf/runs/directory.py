"""The run directory, which contains configuration, environment, logs, checkpoints and results.

    config.yaml  inputs.json  environment.json  data_counts.json  metrics.jsonl  samples.jsonl
    checkpoints/  final/  evaluation/<name>/{summary.json, episodes.jsonl}  report.html

An existing directory is replaced only with --overwrite. A run is resumed with the same
configuration, except for the changes that `rlhf.runs.changes` permits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.common.files import (
    append_text,
    flush_to_disk,
    json_line,
    read_log,
    remove,
    write_text,
)
from rlhf.common.launcher import launcher_number
from rlhf.common.yaml_text import dump_yaml, read_mapping_or_empty
from rlhf.runs.changes import (
    CHANGES_FILE,
    DIRECTORY_KEYS,
    Change,
    find_and_check_changes,
    record_changes,
)
from rlhf.runs.claim import (
    COMMAND_BY_DESCRIPTION,
    MARKER,
    DirectoryClaim,
    convert_write_errors_to_user_errors,
    files_not_written_by_toolkit,
    foreign_file_error,
    path_without_dot_dot,
)
from rlhf.runs.inputs import input_fingerprints, input_paths
from rlhf.runs.machine import describe_machine
from rlhf.runs.renamed import METRIC_COLUMNS
from rlhf.runs.trackers import (
    Tracker,
    close_trackers,
    log_to_trackers,
    open_trackers,
)

BRANCH_FILE = "branch.json"
"""Name of the file with the run and the checkpoint from which `rlhf branch` created a run."""
log = logging.getLogger(__name__)
_MAX_ROW_BYTES = 1 << 20
"""Number of bytes at the end of a log in which the start of its last row is searched."""
DATA_COUNTS_FILE = "data_counts.json"
"""Name of the file with the numbers of rows of the datasets."""


class Run:
    """A run directory to which this process writes.

    With several processes, only the first process writes, and only its `writes` is true.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started = time.monotonic()
        # If there are several processes, only the first one writes.
        self.writes = launcher_number("RANK") == 0
        self.config: Mapping[str, Any] = {}
        self.changes: tuple[Change, ...] = ()
        """Differences between the recorded configuration and that of this process."""
        self.trackers: dict[str, Tracker] | None = None
        self._claim: DirectoryClaim | None = None

    @classmethod
    def open(cls, config: Mapping[str, Any]) -> Run:
        """Create, resume or overwrite the directory of a run.

        Args:
            config: Configuration of the run as plain data, with ``output_dir`` and, if set,
                ``resume`` and ``overwrite``.

        Raises:
            UserError: The directory exists and neither ``resume`` nor ``overwrite`` is set. Or the
                directory is in use or cannot be written, or a change of the configuration or of the
                inputs of the run to resume is not permitted.
        """
        run = cls(path_without_dot_dot(config["output_dir"]))
        run.config = config
        resume, overwrite = bool(config.get("resume")), bool(config.get("overwrite"))
        if not run.writes:
            run._set_permitted_changes(resume=resume and not overwrite)
            return run
        inputs = input_paths(config).values()
        run._claim = DirectoryClaim.open(
            run.directory,
            resume=resume,
            overwrite=overwrite,
            command=str(config.get("command", "")),
            required=("config.yaml",),
            inputs=inputs,
        )
        try:
            run._write_description(resume=resume and not overwrite)
        except BaseException:
            run.close()
            raise
        return run

    def _set_permitted_changes(self, *, resume: bool) -> None:
        """Set ``changes`` of a resumed run, and check that they are permitted.

        Raises:
            UserError: A change is not permitted, or the evaluation contains a file of the user.
        """
        if resume and (self.directory / "config.yaml").exists():
            self.changes = find_and_check_changes(self.directory, self.config)
        if self.changes and self.writes:
            evaluation = self.directory / "evaluation"  # it is deleted when the run continues
            if foreign := next(files_not_written_by_toolkit(evaluation), None):
                raise foreign_file_error(foreign, evaluation)

    def _write_description(self, *, resume: bool) -> None:
        """Write the configuration of the run and descriptions of its inputs and of the machine.

        If the configuration of a resumed run has changed, `record_changes_and_reopen` writes it
        later.
        """
        self._set_permitted_changes(resume=resume)
        with convert_write_errors_to_user_errors(self.directory):
            (self.directory / "checkpoints").mkdir(exist_ok=True)
            if not self.changes:
                self._write_configuration(resume=resume)
            machine = json.dumps(describe_machine(), indent=2)
            write_text(self.directory / "environment.json", machine)

    def _write_configuration(self, *, resume: bool) -> None:
        settings = {key: value for key, value in self.config.items() if key not in DIRECTORY_KEYS}
        inputs = self.directory / "inputs.json"
        # The fingerprint of a file that is missing now remains, to detect a change when it returns.
        recorded = read_mapping_or_empty(inputs) if resume else {}
        write_text(self.directory / "config.yaml", dump_yaml(settings))
        write_text(inputs, json.dumps(recorded | input_fingerprints(settings), indent=2))

    def record_changes_and_reopen(self, step: int) -> None:
        """Record the changed settings of a resumed run, and delete the evaluation of its end.

        The recorded settings and results are unchanged until this method is called, so an error
        during the preparation of training loses nothing.

        Args:
            step: Number of steps of the checkpoint from which the run continues.
        """
        if not self.changes or not self.writes:
            return
        with convert_write_errors_to_user_errors(self.directory):
            self.declare_files([CHANGES_FILE])
            (self.directory / "finished").unlink(missing_ok=True)
            remove(self.directory / "evaluation")
            record_changes(self.directory, step, self.changes)
            self._write_configuration(resume=True)

    @property
    def final(self) -> Path:
        """Folder of the trained model."""
        return self.directory / "final"

    @property
    def finished(self) -> bool:
        """Whether `finish` was called for this run, in this or in an earlier process.

        A run whose settings have changed is not finished.
        """
        if not self.writes and self.config.get("overwrite"):
            return False  # the first process may not have removed the files of the earlier run yet
        return not self.changes and (self.directory / "finished").exists()

    def declare_files(self, names: Iterable[str]) -> None:
        """Record the names of additional files and folders that the run will write."""
        if self._claim is not None:
            self._claim.declare_files(names)

    def finish(self) -> None:
        """Mark the run as complete, so that ``--resume`` does nothing, and close the trackers."""
        if self.writes:
            (self.directory / "finished").touch()
        close_trackers(self.trackers or {})
        self.trackers = None

    def close(self) -> None:
        """Release the lock of the directory. If the run has no result, restore earlier content."""
        if self._claim is not None:
            self._claim.close()

    def write_data_counts(self, counts: Mapping[str, Any]) -> None:
        """Write the numbers of used and dropped rows of the datasets to ``data_counts.json``."""
        if self.writes:
            with convert_write_errors_to_user_errors(self.directory):
                write_text(self.directory / DATA_COUNTS_FILE, json.dumps(counts, indent=2) + "\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to ``metrics.jsonl`` and send the metrics to the trackers.

        The files of a replaced run are then deleted, because this run has a result.

        Args:
            step: Training step of the metrics.
            metrics: Metric key -> value; docs/metrics.md describes the keys.
        """
        row = {"step": step, "time": round(time.monotonic() - self.started, 3), **metrics}
        self._append_row("metrics.jsonl", row)
        if self._claim is not None:
            self._claim.delete_replaced_files()
        if not self.writes or not self.config.get("track"):
            return
        if self.trackers is None:
            flat = flatten_keys(self.config)
            self.trackers = open_trackers(self.config["track"], self.directory, flat, step=step)
        self.trackers = log_to_trackers(self.trackers, step, metrics)

    def write_sample(self, row: Mapping[str, Any]) -> None:
        """Append a transcript to ``samples.jsonl``."""
        self._append_row("samples.jsonl", row)

    def flush_logs(self) -> None:
        """Flush the logs to the disk; call this method before a checkpoint is written.

        A power failure then leaves no checkpoint without the rows of its steps.
        """
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (self.directory / name).exists():
                flush_to_disk(self.directory / name)

    def rewind(self, step: int) -> None:
        """Remove all logged rows after ``step``, so that a resumed run does not log steps twice.

        Transcripts of the final evaluation are removed too, because the resumed run writes them
        again.
        """
        for name in ("metrics.jsonl", "samples.jsonl"):
            path, rows = self.directory / name, []
            if self.writes and path.exists():
                _warn_of_incomplete_row(path, step)
                rows = read_log(path, METRIC_COLUMNS)  # samples have a step, too
                rows = [r for r in rows if r["step"] <= step and r.get("split") != "after"]
                write_text(path, "".join(json_line(row) for row in rows))
            if self.writes and step > 0 and not rows and name == "metrics.jsonl":
                log.warning(
                    "%s has no rows, although %d steps are done: the metrics of these steps are "
                    "lost, and the report begins at the next step",
                    path,
                    step,
                )

    def _append_row(self, name: str, row: Mapping[str, Any]) -> None:
        if self.writes:
            append_text(self.directory / name, json_line(row))


def _warn_of_incomplete_row(path: Path, step: int) -> None:
    """Warn if the last line of a log is incomplete and its step is not after ``step``.

    A kill leaves only incomplete rows of later steps, which the resumed run writes again.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _MAX_ROW_BYTES))
        line = file.read().rsplit(b"\n", 1)[-1]
    match = re.match(rb'\{"step": (\d+)', line)
    if match is None or int(match[1]) > step or line.endswith(b"}"):
        return
    log.warning(
        "%s ends in the middle of the row of step %s, which is lost", path, match[1].decode()
    )


@contextlib.contextmanager
def lock_directory_and_write_config(
    root: Path, config_file_name: str, config: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[DirectoryClaim]:
    """Return a context manager that locks the directory of a pipeline or a study.

    The configuration is written to the locked directory. The value of the context manager is the
    lock.

    Args:
        root: The directory.
        config_file_name: Name of the YAML file in the directory to which ``config`` is written.
        config: Configuration of the pipeline or study, as plain data.
        resume: Whether to continue in an existing directory.
        overwrite: Whether to replace the files in an existing directory.

    Raises:
        UserError: The directory exists and neither ``resume`` nor ``overwrite`` is set. Or the
            directory is in use, cannot be written, or is to be resumed without ``config_file_name``
            or the marker of the toolkit.
    """
    claim = DirectoryClaim.open(
        path_without_dot_dot(root),
        resume=resume,
        overwrite=overwrite,
        command=COMMAND_BY_DESCRIPTION.get(config_file_name, ""),
        required=(
            MARKER,
            config_file_name,
        ),  # the folder of the user's own pipeline.yaml has no marker
        inputs=input_paths(config).values(),
    )
    try:
        with convert_write_errors_to_user_errors(root):
            write_text(root / config_file_name, dump_yaml(dict(config)))
        yield claim
    finally:
        claim.close()


def flatten_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_keys(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def seed_everything(seed: int) -> None:
    """Seed the global random generators of Python, NumPy and PyTorch, which libraries use."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
