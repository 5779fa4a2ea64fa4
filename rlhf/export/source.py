"""Find the model of an export, the run that trained it, and the earlier runs of the same model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.common.files import expand_user
from rlhf.common.names import did_you_mean
from rlhf.common.yaml_text import read_mapping_or_empty
from rlhf.errors import UserError
from rlhf.evaluation.records import RunRecord, is_run_directory, read_run
from rlhf.export.public_text import config_without_paths_and_secrets, public_name
from rlhf.models.adapters import CONFIG_FILE, is_adapter
from rlhf.models.hub import SHORT_NAMES
from rlhf.reward_models.sidecar import Sidecar
from rlhf.runs.claim import path_without_dot_dot
from rlhf.runs.inputs import fingerprint

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_CHECKPOINT_NAME = re.compile(r"(?:step|checkpoint)-(\d+)")
"""Name of the folder of a checkpoint of the native engine or of TRL."""
_MAX_STAGES = 50
"""Maximum number of stages. It ends the search if the records form a cycle."""


@dataclass(frozen=True)
class Stage:
    """One training run of a model, with its configuration without local paths."""

    record: RunRecord
    config: Mapping[str, Any]
    """Content of config.yaml; local files are replaced by their names."""
    inputs: Mapping[str, str]
    """Content of inputs.json: dotted key of a local file or folder -> fingerprint."""
    has_inputs: bool
    """Whether inputs.json exists. Without it, local paths and Hub ids cannot be distinguished."""
    checkpoint_step: int | None = None
    """Step of the checkpoint that is the result of this stage; None for the final model."""

    @classmethod
    def read(cls, directory: Path, model: Path) -> Stage:
        """Read the record of a run, up to the step at which it saved a model.

        The evaluations after training are those of the final model, so a checkpoint has none.

        Args:
            directory: The run directory.
            model: The folder ``final`` or a checkpoint of this run.
        """
        record = read_run(directory)
        step = _checkpoint_step(model)
        if step is not None:
            metrics = [row for row in record.metrics if row["step"] <= step]
            record = replace(record, metrics=metrics, samples=(), evaluations=())
        file = directory / "inputs.json"
        inputs = read_mapping_or_empty(file)
        config = config_without_paths_and_secrets(record.config, inputs)
        return cls(record, config, inputs, file.is_file(), step)

    def is_hub_id(self, key: str, path: str) -> bool:
        """Return whether the value of a configuration key is an id on the Hub."""
        return self.has_inputs and key not in self.inputs and _HUB_ID.fullmatch(path) is not None

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.record.name

    @property
    def command(self) -> str:
        """Name of the command that trained the model; "" if it was not recorded."""
        return str(self.config.get("command") or "")


@dataclass(frozen=True)
class ModelSource:
    """The model to export and what is known about its training."""

    folder: Path
    """Folder of the weights or of the LoRA adapter."""
    stages: Sequence[Stage]
    """Runs that trained the model, in order; empty if there is no record."""
    base_hub_id: str | None
    """Hub id of the model from which the first run started or, without a record of a run, of the
    base of the adapter; None if it is unknown or the model is not from the Hub."""
    base_name: str
    """Name of this base model in the text of a card."""
    sidecar: Sidecar | None
    """Description of a reward model; None for other models."""

    @property
    def is_adapter(self) -> bool:
        """Whether the folder contains a LoRA adapter, which the export merges into its base."""
        return is_adapter(self.folder)

    @property
    def local_inputs(self) -> list[Path]:
        """Existing folders that the export reads.

        They are those of the model, its runs, their initial models, and the base of an adapter.
        """
        folders = [self.folder, *(stage.record.directory for stage in self.stages)]
        starts = [_model_path(stage.record.config) for stage in self.stages]
        if self.is_adapter:
            settings = read_mapping_or_empty(self.folder / CONFIG_FILE)
            starts.append(str(settings.get("base_model_name_or_path") or ""))
        folders += [expand_user(start) for start in starts if start]
        return [folder for folder in folders if folder.exists()]

    @property
    def last_run(self) -> Stage | None:
        """The last run, which wrote the model; None if there is no record."""
        return self.stages[-1] if self.stages else None


def find_model_source(path: str) -> ModelSource:
    """Find the model in a run directory, a checkpoint or a model folder, and read its records.

    Raises:
        UserError: There is no such folder, or it is neither a model nor a single run with a final
            model.
    """
    folder, directory = _model_folder_and_run(path_without_dot_dot(expand_user(path)))
    stages = _training_stages(directory, folder) if directory else []
    base, base_name = _base_hub_id_and_name(folder, stages)
    return ModelSource(folder, stages, base, base_name, Sidecar.read(folder))


def _model_folder_and_run(root: Path) -> tuple[Path, Path | None]:
    """Return the folder of the model and its run directory, which is None if no run wrote it.

    Raises:
        UserError: See `find_model_source`.
    """
    if not root.is_dir():
        siblings = root.parent.iterdir() if root.parent.is_dir() else ()
        hint = did_you_mean(root.name, [path.name for path in siblings if path.is_dir()])
        raise UserError(
            f"{root} is not a folder{hint}: give a run directory, a checkpoint or a model folder"
        )
    if _is_model(root):
        return root, _run_directory_of_model(root)
    if _is_model(root / "final"):
        return root / "final", root
    if stages := [p.name for p in sorted(root.iterdir()) if _is_model(p / "final")]:
        raise UserError(
            f"{root} contains several runs: export one of them, such as {root / stages[-1]}"
        )
    if is_run_directory(root):
        found = (root / "checkpoints").glob("*")
        steps = {path: step for path in found if (step := _checkpoint_step(path)) is not None}
        checkpoints = sorted(steps, key=steps.__getitem__)
        raise UserError(
            f"{root} has no trained model (no final/): "
            + (
                f"resume the run, or export a checkpoint such as {checkpoints[-1]}"
                if checkpoints
                else "it is not finished, or its command trains no model"
            )
        )
    raise UserError(
        f"{root} contains neither a model (config.json or {CONFIG_FILE}) nor a run (config.yaml)"
    )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or is_adapter(folder)


def _run_directory_of_model(model: Path) -> Path | None:
    """Return the directory of the run that wrote a model; None if no run wrote it.

    The model must be `final` or in `checkpoints`, because a config.yaml in another parent folder
    can be that of another run.
    """
    folder = model.absolute()
    run = folder.parent if folder.name == "final" else folder.parent.parent
    is_of_run = folder.name == "final" or folder.parent.name == "checkpoints"
    return run if is_of_run and (run / "config.yaml").is_file() else None


def _checkpoint_step(model: Path) -> int | None:
    """Return the step of a checkpoint of a run; None for another folder."""
    match = _CHECKPOINT_NAME.fullmatch(model.name)
    return int(match[1]) if match and model.parent.name == "checkpoints" else None


def _training_stages(directory: Path, model: Path) -> list[Stage]:
    """Return the stages of a model of a run in order of training.

    An earlier run is included only if its model has the fingerprint that the later run recorded.
    """
    stages = [Stage.read(directory, model)]
    while len(stages) < _MAX_STAGES:
        earlier = _earlier_run_and_model(stages[0])
        if earlier is None:
            break
        stages.insert(0, Stage.read(*earlier))
    return stages


def _earlier_run_and_model(stage: Stage) -> tuple[Path, Path] | None:
    """Return the directory of the run that trained the initial model of a run, and this model.

    The recorded path is tried first. A pipeline can be moved, so the last two components of the
    path, such as ``sft/final``, are tried next in the parent directory of the run. The result is
    None if neither is the model of another run, or if the fingerprint of the model is not the
    recorded one.
    """
    path = _model_path(stage.record.config)
    recorded = stage.inputs.get("model.path")
    if not path or not recorded:
        return None
    start = expand_user(path)
    for folder in (start, stage.record.directory.resolve().parent / start.parent.name / start.name):
        run = _run_directory_of_model(folder)
        if run is not None and run.resolve() != stage.record.directory.resolve():
            return (run, folder) if fingerprint(folder) == recorded else None
    return None


def _model_path(config: Mapping[str, Any]) -> str | None:
    model = config.get("model")
    path = model.get("path") if isinstance(model, Mapping) else model
    return str(path) if path else None


def _base_hub_id_and_name(folder: Path, stages: Sequence[Stage]) -> tuple[str | None, str]:
    """Return the Hub id of the base model, or None, and its name for the text of a card."""
    if not stages:
        name = _adapter_base_hub_id(folder)
        return (name, name) if name else (None, "an unknown model")
    first = stages[0]
    path = _model_path(first.record.config)
    if path is None:
        return None, "a model with random weights"
    if path in SHORT_NAMES:
        return SHORT_NAMES[path].hub, str(SHORT_NAMES[path].hub)
    if first.is_hub_id("model.path", path):
        return path, path
    return None, f"the local model {public_name(path)}"


def _adapter_base_hub_id(folder: Path) -> str | None:
    """Return the Hub id of the base model of an adapter.

    The result is None if the base is a local folder, or if the folder contains no adapter.
    """
    if not is_adapter(folder) or (folder / "base").is_dir():
        return None
    settings = read_mapping_or_empty(folder / CONFIG_FILE)
    name = str(settings.get("base_model_name_or_path") or "")
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None
