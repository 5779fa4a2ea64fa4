"""`rlhf run`: stages in order, each in a directory of its own, chained by name.

    output_dir: runs/quickstart
    seed: 0
    stages:
      - {name: sft, verb: sft, model: {scratch: {}}, data: [{path: demos.jsonl}]}
      - {name: ppo, verb: ppo, model: {path: stage:sft}, ...}

``stage:NAME`` stands for what a stage leaves (its ``final/`` model), ``stage:NAME/FILE`` for a file
in its directory. ``--NAME.key value`` overrides a stage's key.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.table import configure, run_command, verb_named
from rlhf.common.names import nearest
from rlhf.config.load import assemble, check_keys, set_key
from rlhf.errors import UserError
from rlhf.runs.directory import open_directory
from rlhf.runs.launch import release_memory

log = logging.getLogger(__name__)

PREFIX = "stage:"


@dataclass(frozen=True)
class Pipeline:
    """The whole file, checked for its own keys; stages stay plain data until they run."""

    output_dir: str
    stages: list[dict[str, Any]]
    seed: int = 0
    resume: bool = False
    overwrite: bool = False


def read_pipeline(files: Sequence[str | Path], overrides: Sequence[tuple[str, Any]]) -> Pipeline:
    """A pipeline from its files and overrides, every stage checked before any runs.

    Raises:
        UserError: names the stage and the key.
    """
    tree = assemble(files, [])
    stages = tree.get("stages")
    if not isinstance(stages, list) or not stages:
        raise UserError("pipeline: `stages` must be a list of stages, each with a name and a verb")
    names = [_name_of(stage, index) for index, stage in enumerate(stages)]
    for key, value in overrides:
        head, _, rest = key.partition(".")
        if rest and head in names:
            set_key(stages[names.index(head)], rest, value)
        elif rest and head != "stages":
            raise UserError(f"--{key}: no stage is called {head!r}{nearest(head, names)}")
        else:
            set_key(tree, key, value)
    check_keys(Pipeline, {k: v for k, v in tree.items() if k != "stages"}, {})
    if not tree.get("output_dir"):
        raise UserError("pipeline: output_dir is missing")
    pipeline = Pipeline(**tree)
    for index, name in enumerate(names):
        _check_stage(pipeline, index, name, names)
    return pipeline


def _name_of(stage: Any, index: int) -> str:
    if not isinstance(stage, dict) or "name" not in stage or "verb" not in stage:
        raise UserError(f"stages.{index}: a stage needs a name and a verb")
    return str(stage["name"])


def _check_stage(pipeline: Pipeline, index: int, name: str, names: list[str]) -> None:
    """Verb, keys, types and references of one stage."""
    if names.count(name) > 1:
        raise UserError(f"stages: two are called {name!r}; names must differ")
    stage = pipeline.stages[index]
    try:
        verb_named(stage["verb"])
        for reference in _references(stage):
            target = reference.removeprefix(PREFIX).partition("/")[0]
            if target not in names[:index]:
                raise UserError(
                    f"{reference}: no earlier stage is called {target!r}"
                    f"{nearest(target, names[:index])}"
                )
        verbs = {str(other["name"]): other["verb"] for other in pipeline.stages}
        _check_models(stage, verbs)
        configure(stage["verb"], stage_tree(pipeline, stage))
    except UserError as error:
        raise UserError(f"stage {name}: {error}") from error


def _check_models(stage: Mapping[str, Any], verbs: Mapping[str, str]) -> None:
    """Refuse stages as models that leave none, or a model of the other kind.

    Args:
        stage: to be checked.
        verbs: of all stages, by name.
    """
    policies = stage.get("policies") or []
    specs = [stage, *(p for p in policies if isinstance(p, Mapping))]
    for spec in specs:
        verb = _verb_behind(spec.get("model"), "path", verbs)
        if verb and not leaves_policy(verb) and not (verb == stage["verb"] == "reward"):
            raise UserError(
                f"model.path {spec['model']['path']}: `rlhf {verb}` leaves no language model"
            )
    for key in ("rewards", "gold"):
        for row in stage.get(key) or []:
            verb = _verb_behind(row, "path", verbs)
            if verb and verb != "reward":
                raise UserError(f"{key}: {row['path']}: `rlhf {verb}` leaves no reward model")


def _verb_behind(spec: Any, key: str, verbs: Mapping[str, str]) -> str | None:
    """The verb of the stage whose ``final/`` a key names; None where it names anything else."""
    path = spec.get(key) if isinstance(spec, Mapping) else None
    if not isinstance(path, str) or not path.startswith(PREFIX) or "/" in path:
        return None
    return verbs[path.removeprefix(PREFIX)]


def leaves_policy(verb: str) -> bool:
    """Whether a verb's ``final/`` is a language model."""
    return verb in ("sft", "dpo", "kto") or verb in ALGORITHMS


def before_training(pipeline: Pipeline, stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage that starts from models as they are before earlier stages train them.

    Their form is that of the trained ones, so that a plan can be made of a stage that waits.
    References that do not lead to a model that is there stay.
    """
    stages = {str(other["name"]): other for other in pipeline.stages}
    model = stage.get("model")
    while isinstance(model, Mapping) and str(model.get("path", "")).startswith(PREFIX):
        path = str(model["path"])
        if _place(Path(pipeline.output_dir), path).exists():
            break
        origin = stages[path.removeprefix(PREFIX).partition("/")[0]].get("model")
        if not isinstance(origin, Mapping) or "/" in path or not origin.get("path"):
            break
        model = {**model, "path": origin["path"]}
    return {**stage, "model": model} if model is not None else dict(stage)


def _references(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [found for item in value.values() for found in _references(item)]
    if isinstance(value, list):
        return [found for item in value for found in _references(item)]
    return [value] if isinstance(value, str) and value.startswith(PREFIX) else []


def waits_for(pipeline: Pipeline, stage: Mapping[str, Any]) -> list[str]:
    """References of a stage to what earlier stages have yet to write."""
    root = Path(pipeline.output_dir)
    return [found for found in _references(stage) if not _place(root, found).exists()]


def _place(root: Path, reference: str) -> Path:
    name, _, file = reference.removeprefix(PREFIX).partition("/")
    return root / name / (file or "final")


def stage_tree(pipeline: Pipeline, stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's configuration with its directory, the pipeline's seed, and references resolved."""
    root = Path(pipeline.output_dir)

    def resolved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: resolved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [resolved(item) for item in value]
        if isinstance(value, str) and value.startswith(PREFIX):
            return str(_place(root, value))
        return value

    own = {key: resolved(value) for key, value in stage.items() if key not in ("name", "verb")}
    common = {"seed": pipeline.seed, "resume": pipeline.resume}
    return {**common, **own, "output_dir": str(root / stage["name"])}


def run_pipeline(pipeline: Pipeline) -> Path:
    """Run every stage that is not finished yet, then draw the report of the whole.

    Returns:
        The pipeline's report.

    Raises:
        UserError: the directory exists, or a stage failed; finished stages are kept.
    """
    from rlhf.reports import write_report

    root = Path(pipeline.output_dir)
    tree = {"seed": pipeline.seed, "stages": pipeline.stages}
    open_directory(
        root, "pipeline.yaml", tree, resume=pipeline.resume, overwrite=pipeline.overwrite
    )
    for number, stage in enumerate(pipeline.stages, start=1):
        log.info("stage %d of %d: %s", number, len(pipeline.stages), stage["name"])
        try:
            run_command(stage["verb"], stage_tree(pipeline, stage))
            release_memory()
        except UserError as error:
            raise type(error)(f"stage {stage['name']}: {error}") from error
    return write_report(root)
