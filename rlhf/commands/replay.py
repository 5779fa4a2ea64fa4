"""Implements `rlhf replay`, which repeats the check of the alarm that halted a run."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.commands.command import CommandTable
from rlhf.common.files import read_json
from rlhf.errors import UserError, first_line
from rlhf.runs.alarms import ALARMS, HALTED_FOLDER, Halt
from rlhf.runs.claim import path_without_dot_dot
from rlhf.runs.diagnostics import repeat_metric_checks


@dataclass(frozen=True)
class AlarmReplayConfig:
    """Configuration of `rlhf replay`: a run that an alarm halted."""

    directory: str
    """Directory of the run."""


def repeat_alarm_check(
    config: AlarmReplayConfig, *, commands: CommandTable
) -> Generator[str, None, int]:
    """Repeat the check that halted a run; yield lines that state whether the same alarm occurs.

    The check uses the data that the run saved. It uses the current code, so that a corrected
    reward, model or library can be tested.

    Returns:
        0 if the same alarm occurs, otherwise 1.

    Raises:
        UserError: No alarm halted the run, its files are damaged, or the run did not save the batch
            that the check needs.
    """
    bundle = path_without_dot_dot(config.directory) / HALTED_FOLDER
    path = bundle / "alarm.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: no alarm halted a run in {config.directory}")
    recorded = read_json(path)
    if not (
        isinstance(recorded, dict) and recorded.get("alarm") in ALARMS and "config" in recorded
    ):
        raise UserError(f"{path} is damaged, or another version of rlhf wrote it")
    has_batch = (bundle / "evidence.pt").exists()
    if ALARMS[recorded["alarm"]].before_update and not has_batch:
        raise UserError(
            f"{bundle} does not contain a batch, so the check of alarm {recorded['alarm']} cannot "
            "be repeated: it was a check of the weights, which has no batch, or the run used "
            "engine trl, which does not save batches"
        )
    try:
        if has_batch:
            _repeat_update_checks(bundle, recorded["config"], commands)
        else:
            repeat_metric_checks(bundle, recorded["config"])
    except Halt as halt:
        yield str(halt)
        if halt.name == recorded["alarm"]:
            yield f"reproduced: {halt.name}"
            return 0
        yield f"different alarm: {halt.name} instead of {recorded['alarm']}"
        return 1
    yield f"not reproduced: {recorded['alarm']}"
    return 1


def _repeat_update_checks(
    alarm_folder: Path, tree: Mapping[str, Any], commands: CommandTable
) -> None:
    """Repeat the checks that precede an update, with the batch and the checkpoint of the alarm.

    Alarms about scores or about tensors of a batch have no checkpoint, because their checks do not
    use the model.

    Raises:
        Halt: A check raises an alarm.
        UserError: The file of the batch cannot be read.
    """
    import torch

    from rlhf.training.checkpoint import load_checkpoint, remove_damaged_and_find_latest

    try:
        evidence = torch.load(alarm_folder / "evidence.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types of exceptions
        raise UserError(
            f"{alarm_folder / 'evidence.pt'} cannot be read: {first_line(error)}"
        ) from error
    trainer = _make_trainer({**tree, "output_dir": str(alarm_folder)}, commands)
    try:
        if checkpoint := remove_damaged_and_find_latest(alarm_folder):
            load_checkpoint(checkpoint, trainer)
        trainer.repeat_checks_of_halted_update(evidence)
    finally:
        trainer.close()


def _make_trainer(tree: Mapping[str, Any], commands: CommandTable) -> Any:
    """Create the trainer of the native engine from a recorded configuration."""
    from rlhf.algorithms.registry import ALGORITHMS
    from rlhf.config.optimization import native_options
    from rlhf.runs.directory import seed_everything
    from rlhf.training import offline
    from rlhf.training.online import OnlineTrainer

    command = tree["command"]
    config = commands.config_from_tree(command, tree)
    if command in ALGORITHMS:
        return OnlineTrainer(command, config)
    seed_everything(config.seed)
    method = offline.method_of(command, config)
    train_rows, eval_rows = offline.load_train_and_eval_rows(config, method)
    setup = method.setup(config, train_rows, "native")
    sets = setup.encode(train_rows, True), setup.encode(eval_rows, False)
    options = native_options(command, config.trainer, default_learning_rate=method.learning_rate)
    return offline.NATIVE_TRAINERS[command](config, options, setup, *sets)
