"""Implements `rlhf branch`, which copies a checkpoint of a run into a new run directory.

The new run continues from the checkpoint with ``--resume``, as the old run would have done, and can
have more steps or other settings. The old run is only read.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.common.files import (
    atomic_path,
    describe_write_error,
    find_write_error,
    json_line,
    read_json,
    write_text,
)
from rlhf.common.yaml_text import read_mapping_or_empty
from rlhf.errors import UserError
from rlhf.runs.changes import CHANGES_FILE, read_changes
from rlhf.runs.checksums import CHECKSUMS_FILE, update_checksum, verify_checksums, write_checksums
from rlhf.runs.claim import (
    check_new_directory,
    convert_write_errors_to_user_errors,
    path_without_dot_dot,
)
from rlhf.runs.directory import BRANCH_FILE, Run
from rlhf.runs.renamed import check_not_recorded_by_old_version, metric_rows, upgraded_config

_CHECKPOINT_NAME = r"(?:step|checkpoint)-(\d+)"
_SHARED_FOLDERS = ("base", "reference")
"""Folders that belong to every checkpoint of a run: the base model of adapters, and the
log-probabilities of the reference in DPO."""


_TRAINING_STATE = (
    CHECKSUMS_FILE,
    "optimizer",
    "optimizer.pt",
    "replies.jsonl",
    "schedule.pt",
    "state.json",
)
"""Names of the files and folders of a checkpoint that do not belong to its model."""


@dataclass(frozen=True)
class BranchConfig:
    """Configuration of `rlhf branch`."""

    checkpoint: str
    """Checkpoint of a run, such as runs/ppo/checkpoints/step-40."""
    output_dir: str
    """Directory of the new run, which must be empty or not exist."""


def branch(config: BranchConfig) -> Iterator[str]:
    """Create the new run directory; yield messages, the last with the command to continue the run.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or the new directory is not empty or
            has an invalid path. Or version 0.1.0 wrote the run.
    """
    source = Path(os.path.abspath(config.checkpoint))
    target = path_without_dot_dot(config.output_dir)
    run = source.parent.parent
    recorded = read_mapping_or_empty(run / "config.yaml")
    check_not_recorded_by_old_version(recorded, run / "config.yaml")
    step, recorded = _checked_checkpoint_step(source), upgraded_config(recorded)
    if "command" not in recorded:
        raise UserError(f"{run / 'config.yaml'} is not the configuration of a training run")
    check_new_directory(target)
    if run.resolve() in target.resolve().parents:
        raise UserError(f"{target} is inside the run {run}: choose another --output_dir")
    # A link to an empty folder is kept, and the folder becomes the run directory.
    with convert_write_errors_to_user_errors(target), atomic_path(target.resolve()) as partial:
        _write_run_up_to_checkpoint(source, step, partial, recorded)
        kept_best = _copy_or_reset_best_model(source, partial)
    yield f"{target} continues {run} after step {step}; {run} is unchanged"
    if not kept_best:
        yield (
            f"the best model of {run} up to step {step} no longer exists, so the best model is "
            "selected from the following evaluations"
        )
    words = ["rlhf", str(recorded["command"]), "--config", str(target / "config.yaml")]
    words += ["--output_dir", str(target), "--resume"]
    yield f"continue: {shlex.join(words)}"


def _checked_checkpoint_step(source: Path) -> int:
    """Check that a path is a checkpoint of a training run; return its step.

    Raises:
        UserError: The path is not a complete checkpoint of a run.
    """
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source.parent
    names = [path.name for path in _checkpoints_in(folder)]
    has = f"{folder} has {', '.join(names) or 'no checkpoint'}"
    match = re.fullmatch(_CHECKPOINT_NAME, source.name)
    if not match or not source.is_dir():
        why = "has only weights" if source.name == "best" else "is not a checkpoint"
        raise UserError(f"{source} {why}, so a run cannot continue from it; {has}")
    if not (source.parent.parent / "config.yaml").is_file():
        raise UserError(
            f"{source} does not belong to a run: {source.parent.parent} has no config.yaml"
        )
    if not (source / CHECKSUMS_FILE).is_file():
        raise UserError(
            f"{source} is incomplete: its run was killed or is still writing the checkpoint; {has}"
        )
    return int(match[1])


def _checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, in order of their step."""
    folders = [path for path in folder.glob("*-*") if re.fullmatch(_CHECKPOINT_NAME, path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def _write_run_up_to_checkpoint(
    source: Path, step: int, target: Path, recorded: Mapping[str, Any]
) -> None:
    """Write a run directory with a checkpoint and the run's logs up to it, without the best model.

    Args:
        source: The checkpoint.
        step: Step of the checkpoint.
        target: Folder to create.
        recorded: Configuration of the run of the checkpoint.

    Raises:
        UserError: The checkpoint is damaged.
    """
    old = source.parent.parent
    verify_checksums(source)
    run = Run.open({**recorded, "output_dir": str(target)})
    run.declare_files([BRANCH_FILE, CHANGES_FILE])
    try:
        # Changes of the input files since the start of the run can then still be detected.
        if (old / "inputs.json").is_file():
            shutil.copy2(old / "inputs.json", target / "inputs.json")
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (old / name).is_file():
                shutil.copy2(old / name, target / name)
        run.rewind(step)
        # config.yaml has the latest settings of the old run, so settings that it changed after the
        # checkpoint apply from the checkpoint on.
        changes = [{**row, "step": min(row["step"], step)} for row in read_changes(old)]
        if changes:
            write_text(target / CHANGES_FILE, "".join(map(json_line, changes)))
        shared = [source.parent / name for name in _SHARED_FOLDERS]
        for folder in (source, *filter(Path.is_dir, shared)):
            _copy_folder(folder, target / "checkpoints" / folder.name)
        origin = {"run": str(old.resolve()), "checkpoint": source.name, "step": step}
        write_text(target / BRANCH_FILE, json.dumps(origin, indent=2))
    finally:
        run.close()


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a folder of a run, which may still be running.

    Raises:
        UserError: The folder was removed while it was copied, or the copy cannot be written.
    """
    try:
        shutil.copytree(source, target)
    except OSError as error:
        cause = find_write_error(error) or error
        reason = describe_write_error(cause) if source.is_dir() else "its run removed it"
        raise UserError(f"{source} cannot be copied: {reason}") from error


def _copy_or_reset_best_model(source: Path, target: Path) -> bool:
    """Copy the best model of the run if it is the best one up to the checkpoint.

    If the checkpoint itself is the best, its model is copied. Otherwise, the copied checkpoint is
    changed so that the selection starts again. A checkpoint of TRL's trainer is not changed.

    Returns:
        Whether the best model up to the checkpoint is kept, or there was none.

    Raises:
        UserError: The best checkpoint of TRL's trainer no longer exists, or a folder cannot be
            copied.
    """
    copy = target / "checkpoints" / source.name
    if source.name.startswith("checkpoint"):
        return _copy_best_trl_checkpoint(source, copy)
    state = read_json(copy / "state.json")
    progress = state["progress"]
    if progress["best_loss"] == float("inf"):
        return True
    if _best_model_precedes_checkpoint(source, progress):
        _copy_folder(source.parent / "best", copy.parent / "best")
        return True
    if progress["evaluations_since_best"] == 0 and _was_evaluated(source):
        ignored = shutil.ignore_patterns(*_TRAINING_STATE)
        shutil.copytree(copy, copy.parent / "best", ignore=ignored)
        write_checksums(copy.parent / "best")
        return True
    progress |= {"best_loss": float("inf"), "evaluations_since_best": 0}
    write_text(copy / "state.json", json.dumps(state, indent=2))
    update_checksum(copy / "state.json")
    return False


def _was_evaluated(checkpoint: Path) -> bool:
    """Return whether the model of a checkpoint was evaluated when the checkpoint was written."""
    step = int(checkpoint.name.split("-")[1])
    rows = (row for row in metric_rows(checkpoint.parent.parent) if row["step"] == step)
    return any(key.startswith("eval/") for row in rows for key in row)


def _best_model_precedes_checkpoint(source: Path, progress: Mapping[str, Any]) -> bool:
    """Return whether the best model of a run is the best one up to a checkpoint.

    Args:
        source: The checkpoint.
        progress: Progress in the checkpoint.

    Returns:
        False if the best model has changed, or if this is unknown: ``best/`` does not exist, the
        last checkpoint is damaged, or steps were logged after it.
    """
    last = _checkpoints_in(source.parent)[-1]
    logged = max((row["step"] for row in metric_rows(source.parent.parent)), default=0)
    try:
        at_end = read_json(last / "state.json")["progress"]
    except (OSError, UserError):
        return False
    return (
        (source.parent / "best").is_dir()
        and logged <= at_end["step"]  # a later evaluation may have replaced the best model
        and at_end["best_loss"] == progress["best_loss"]
    )


def _copy_best_trl_checkpoint(source: Path, copied_checkpoint: Path) -> bool:
    """Copy the best checkpoint of TRL's trainer up to the checkpoint `source`; return True.

    Raises:
        UserError: The best checkpoint no longer exists.
    """
    recorded = read_json(source / "trainer_state.json").get("best_model_checkpoint")
    name = Path(recorded).name if recorded else source.name
    if name == source.name:
        return True
    if not (source.parent / name).is_dir():
        raise UserError(
            f"{source} needs the checkpoint {name} with the lowest held-out loss, which no longer "
            "exists"
        )
    _copy_folder(source.parent / name, copied_checkpoint.parent / name)
    return True
