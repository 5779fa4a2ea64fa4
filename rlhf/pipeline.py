"""Implements `rlhf run`, which runs stages in order, each in a separate directory.

A stage refers to the results of an earlier stage by the earlier stage's name.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.commands.command import CommandTable
from rlhf.commands.dry_run import check_config_without_data
from rlhf.common.names import FILE_NAME_RULE, did_you_mean, is_file_name
from rlhf.common.ranges import Seed, convert_to_type
from rlhf.config.base import DirectoryConfig
from rlhf.config.load import (
    ConfigSource,
    assemble_tree_and_load_plugins,
    build_config,
    set_dotted_key,
)
from rlhf.errors import UserError
from rlhf.runs.changes import permits_content_change
from rlhf.runs.checksums import CHECKSUMS_FILE, DamagedFolderError, verify_checksums
from rlhf.runs.claim import DESCRIPTIONS, RESULTS
from rlhf.runs.directory import lock_directory_and_write_config
from rlhf.runs.inputs import leaf_items
from rlhf.runs.launch import collect_garbage_and_trim_heap
from rlhf.runs.renamed import check_no_old_names

log = logging.getLogger(__name__)

REFERENCE_PREFIX = "stage:"


@dataclass(frozen=True)
class Pipeline(DirectoryConfig):
    """A list of stages; each stage is a command with its configuration.

    output_dir: runs/quickstart
    seed: 0
    stages:
      - {name: sft, command: sft, model: {scratch: {}}, data: [{path: demos.jsonl}]}
      - {name: ppo, command: ppo, model: {path: stage:sft}, ...}

    ``stage:NAME`` refers to the model in ``final/`` of an earlier stage, and ``stage:NAME/FILE`` to
    a file in the directory of an earlier stage. ``--NAME.key value`` overrides a key of a stage.
    """

    stages: list[dict[str, Any]]
    """The stages; each has a name, a command, and configuration keys of the command."""
    seed: Seed = 0
    """Random seed of the stages whose configuration has no seed."""


def read_pipeline(
    sources: Sequence[ConfigSource], overrides: Sequence[tuple[str, Any]], commands: CommandTable
) -> Pipeline:
    """Read a pipeline, load its plug-ins, and check every stage before any of them runs.

    Raises:
        UserError: The pipeline, an override or a stage is invalid; the message names the stage or
            the key.
    """
    tree = assemble_tree_and_load_plugins(sources, [])
    stages = tree.get("stages")
    if not isinstance(stages, list) or not stages:
        raise UserError(
            "pipeline: `stages` must be a list with at least one stage; a stage has a name and a "
            "command"
        )
    names = [_validated_stage_name(stage, index) for index, stage in enumerate(stages)]
    for key, value in overrides:
        head, _, rest = key.partition(".")
        if rest and head in names:
            set_dotted_key(stages[names.index(head)], rest, value)
        elif rest and head != "stages":
            raise UserError(f"--{key}: no stage is called {head!r}{did_you_mean(head, names)}")
        else:
            set_dotted_key(tree, key, value)
    pipeline = build_config(Pipeline, tree)
    for index, name in enumerate(names):
        _check_stage(pipeline, index, name, names, commands)
    return pipeline


def _validated_stage_name(stage: Any, index: int) -> str:
    """Return the name of a stage.

    Raises:
        UserError: The name or the command is missing or invalid.
    """
    check_no_old_names(stage, f"stages.{index}")
    if not isinstance(stage, dict) or "name" not in stage or "command" not in stage:
        raise UserError(f"stages.{index}: a stage needs a name and a command")
    convert_to_type(str, stage["command"], f"stages.{index}.command")
    name = convert_to_type(str, stage["name"], f"stages.{index}.name")
    if not is_file_name(name) or name in DESCRIPTIONS | RESULTS:
        raise UserError(
            f"stages.{index}.name: {name!r} is not a valid stage name; it is used as a folder name "
            f"({FILE_NAME_RULE}) and must differ from the names of the toolkit's own files"
        )
    return name


def _check_stage(
    pipeline: Pipeline, index: int, name: str, names: list[str], commands: CommandTable
) -> None:
    """Check the command, keys, types and references of a stage.

    Raises:
        UserError: One of them is invalid, or two stages have the same name.
    """
    if names.count(name) > 1:
        raise UserError(f"stages: two stages have the name {name!r}; names must differ")
    stage = pipeline.stages[index]
    try:
        for reference in _stage_references(stage):
            target = reference.removeprefix(REFERENCE_PREFIX).partition("/")[0]
            if target not in names[:index]:
                raise UserError(
                    f"{reference}: no earlier stage is called {target!r}"
                    f"{did_you_mean(target, names[:index])}"
                )
        commands_by_name = {str(other["name"]): other["command"] for other in pipeline.stages}
        _check_model_references(stage, commands_by_name)
        config = commands.config_from_tree(stage["command"], stage_config_tree(pipeline, stage))
        check_config_without_data(stage["command"], config, with_model=False)
    except UserError as error:
        raise UserError(f"stage {name}: {error}") from error


def _check_model_references(stage: Mapping[str, Any], commands_by_name: Mapping[str, str]) -> None:
    """Raise UserError if a model or reward refers to a stage that does not train that kind."""
    specs = [stage, *(p for p in _list_or_empty(stage, "policies") if isinstance(p, Mapping))]
    for spec in specs:
        command = _referenced_command(spec.get("model"), commands_by_name)
        is_policy = command in ("sft", "dpo", "kto") or command in ALGORITHMS
        if command and not is_policy and not (command == stage["command"] == "reward"):
            raise UserError(
                f"model.path {spec['model']['path']}: `rlhf {command}` writes no language model"
            )
    for key in ("rewards", "gold"):
        for row in _list_or_empty(stage, key):
            command = _referenced_command(row, commands_by_name)
            if command and command != "reward":
                raise UserError(f"{key}: {row['path']}: `rlhf {command}` writes no reward model")


def _list_or_empty(stage: Mapping[str, Any], key: str) -> list[Any]:
    """Return the list at a key of a stage, or [] if the value is missing or not a list.

    A value of another type is reported when the command checks its configuration.
    """
    value = stage.get(key)
    return value if isinstance(value, list) else []


def _referenced_command(spec: Any, commands_by_name: Mapping[str, str]) -> str | None:
    """Return the command of the stage that a model or reward refers to with ``stage:NAME``.

    The result is None if ``spec`` has no such reference.
    """
    path = spec.get("path") if isinstance(spec, Mapping) else None
    if not isinstance(path, str) or not path.startswith(REFERENCE_PREFIX) or "/" in path:
        return None
    return commands_by_name[path.removeprefix(REFERENCE_PREFIX)]


def replace_missing_with_initial_model(
    pipeline: Pipeline, stage: Mapping[str, Any]
) -> dict[str, Any]:
    """Replace a stage's reference to a missing model by the initial model of the referenced stage.

    The initial model has the architecture of the trained model, so a dry run can plan the stage
    with it. The reference is unchanged if the trained model exists, if the reference names a file,
    or if the referenced stage has no ``model.path``.

    Returns:
        A copy of the stage.
    """
    stages = {str(other["name"]): other for other in pipeline.stages}
    model = stage.get("model")
    while isinstance(model, Mapping) and str(model.get("path", "")).startswith(REFERENCE_PREFIX):
        path = str(model["path"])
        if _reference_path(Path(pipeline.output_dir), path).exists():
            break
        origin = stages[path.removeprefix(REFERENCE_PREFIX).partition("/")[0]].get("model")
        if not isinstance(origin, Mapping) or "/" in path or not origin.get("path"):
            break
        model = {**model, "path": origin["path"]}
    return {**stage, "model": model} if model is not None else dict(stage)


def _stage_references(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [name for item in value.values() for name in _stage_references(item)]
    if isinstance(value, list):
        return [name for item in value for name in _stage_references(item)]
    return [value] if isinstance(value, str) and value.startswith(REFERENCE_PREFIX) else []


def missing_references(pipeline: Pipeline, stage: Mapping[str, Any]) -> list[str]:
    """Return a stage's references to models and files that do not exist yet."""
    root = Path(pipeline.output_dir)
    return [name for name in _stage_references(stage) if not _reference_path(root, name).exists()]


def _reference_path(root: Path, reference: str) -> Path:
    name, _, file = reference.removeprefix(REFERENCE_PREFIX).partition("/")
    return root / name / (file or "final")


def _verify_reference_checksums(root: Path, stage: Mapping[str, Any]) -> None:
    """Verify the trained models to which a stage refers, except those without checksums.

    Raises:
        DamagedFolderError: A file of a model is missing or damaged.
    """
    for folder in {_reference_path(root, name) for name in _stage_references(stage)}:
        if (folder / CHECKSUMS_FILE).is_file():
            try:
                verify_checksums(folder)
            except DamagedFolderError as error:
                raise DamagedFolderError(
                    f"{error}; remove the folder {folder.parent} to repeat that stage"
                ) from error


def stage_config_tree(pipeline: Pipeline, stage: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration tree of a stage's command.

    ``output_dir`` is the directory of the stage. The defaults of ``seed`` and ``resume`` are the
    values of the pipeline. ``plugins`` are those of the pipeline and of the stage. References to
    earlier stages are replaced by paths.
    """
    root = Path(pipeline.output_dir)

    def with_reference_paths(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: with_reference_paths(item) for key, item in value.items()}
        if isinstance(value, list):
            return [with_reference_paths(item) for item in value]
        if isinstance(value, str) and value.startswith(REFERENCE_PREFIX):
            return str(_reference_path(root, value))
        return value

    keys = {
        key: with_reference_paths(value)
        for key, value in stage.items()
        if key not in ("name", "command")
    }
    common = {"seed": pipeline.seed, "resume": pipeline.resume}
    if plugins := list(dict.fromkeys([*pipeline.plugins, *_list_or_empty(stage, "plugins")])):
        keys["plugins"] = plugins
    return {**common, **keys, "output_dir": str(root / stage["name"])}


def run_pipeline(pipeline: Pipeline, commands: CommandTable) -> Path:
    """Run the unfinished stages in order, then write the pipeline's report.

    Returns:
        Path of the report.

    Raises:
        UserError: The directory exists and neither ``resume`` nor ``overwrite`` is set, a changed
            stage cannot be resumed, or a stage failed. The results of finished stages are kept.
        Halt: An alarm ended the training of a stage.
    """
    from rlhf.reports import write_report

    root = Path(pipeline.output_dir)
    tree: dict[str, Any] = {"seed": pipeline.seed, "stages": pipeline.stages}
    if pipeline.plugins:
        tree["plugins"] = pipeline.plugins
    if pipeline.resume and not pipeline.overwrite:  # before pipeline.yaml is written again
        _check_changes_allow_resume(pipeline, commands)
    if pipeline.overwrite and root.exists():  # find mistakes before the old run is replaced
        plan("run", pipeline, commands)
    with lock_directory_and_write_config(
        root, "pipeline.yaml", tree, resume=pipeline.resume, overwrite=pipeline.overwrite
    ) as claim:
        for number, stage in enumerate(pipeline.stages, start=1):
            log.info("stage %d of %d: %s", number, len(pipeline.stages), stage["name"])
            with _add_stage_name_to_errors(stage):
                _verify_reference_checksums(root, stage)
                commands.run_command(stage["command"], stage_config_tree(pipeline, stage))
                claim.delete_replaced_files()
                collect_garbage_and_trim_heap()
        return write_report(root)


def _check_changes_allow_resume(pipeline: Pipeline, commands: CommandTable) -> None:
    """Check that every stage that has started can be resumed, before any of them continues.

    Raises:
        UserError: A change of a stage is not permitted, or stages used the results of a stage that
            would take more steps.
    """
    continuing: set[str] = set()
    outdated: dict[str, str] = {}  # folder of a stage -> why it must be repeated
    for stage in pipeline.stages:
        tree = stage_config_tree(pipeline, stage)
        with _add_stage_name_to_errors(stage):
            changes = commands.changes_on_resume(stage["command"], tree)
        if changes is None:
            continue
        origins = {
            key: value.removeprefix(REFERENCE_PREFIX).partition("/")[0]
            for key, value in leaf_items(stage)
            if isinstance(value, str) and value.startswith(REFERENCE_PREFIX)
        }
        for key, origin in origins.items():
            if origin in continuing and not permits_content_change(stage, key):
                outdated[tree["output_dir"]] = (
                    f"stage {stage['name']}: {key} is a result of the stage {origin}, which would "
                    "change, because a stage takes more steps"
                )
        if any(change.increases_steps for change in changes) or continuing & set(origins.values()):
            continuing.add(stage["name"])
    if outdated:
        reason = next(iter(outdated.values()))
        what = "this stage" if len(outdated) == 1 else "these stages"
        raise UserError(f"{reason}; to repeat {what}, remove {' and '.join(outdated)}")


@contextlib.contextmanager
def _add_stage_name_to_errors(stage: Mapping[str, Any]) -> Iterator[None]:
    """Return a context manager that adds the name of the stage to a UserError."""
    try:
        yield
    except UserError as error:
        error.args = (f"stage {stage['name']}: {error}",)
        raise


def run(pipeline: Pipeline, commands: CommandTable) -> Generator[str, None, int]:
    """Run a pipeline; yield the path of its report."""
    yield str(run_pipeline(pipeline, commands))
    return 0


def plan(name: str, pipeline: Pipeline, commands: CommandTable) -> str:
    """Return a description of what every stage would do, for `--dry-run`.

    Raises:
        UserError: The configuration of a stage is invalid.
    """
    lines = []
    for stage in pipeline.stages:
        with _add_stage_name_to_errors(stage):
            lines += [f"== {stage['name']}", _plan_stage(pipeline, stage, commands)]
    return "\n".join(lines)


def _plan_stage(pipeline: Pipeline, stage: Mapping[str, Any], commands: CommandTable) -> str:
    """Return a description of what a stage would do.

    If only the models of earlier stages are missing, the stage is planned with the initial models
    of these stages. If data or rewards are missing, the rest of the configuration is checked.
    """
    command, waiting = stage["command"], missing_references(pipeline, stage)
    note = f"requires the results of {', '.join(waiting)}"
    if waiting:
        stage = replace_missing_with_initial_model(pipeline, stage)
    config = commands.config_from_tree(command, stage_config_tree(pipeline, stage))
    if not waiting:
        return commands.plan(command, config)
    if not missing_references(pipeline, stage):
        return f"{commands.plan(command, config)}\n{note}; planned with the initial model"
    model = stage.get("model")
    has_model = (
        isinstance(model, Mapping) and "path" in model and not missing_references(pipeline, model)
    )
    check_config_without_data(command, config, with_model=has_model)
    return f"keys and types are valid; {note}"
