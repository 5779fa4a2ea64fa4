"""Read a benchmark's manifest and check the configuration of every run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from rlhf.algorithms import registry
from rlhf.commands.command import CommandTable
from rlhf.common.names import did_you_mean
from rlhf.config.bench import BenchAlgorithm, BenchConfig, BenchEnvironment
from rlhf.config.evaluate import PolicySpec
from rlhf.config.load import build_config
from rlhf.config.offline import OfflineConfig
from rlhf.config.online import algorithm_of
from rlhf.errors import UserError
from rlhf.studies.bench.plan import Bench

T = TypeVar("T")

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
# Names that are reserved, because other folders and table rows have them.
_RESERVED_NAMES = (
    "demos",
    "demos-held-out",
    "sft",
    "model",
    "initial",
    "evaluate",
    "random",
    "expert",
)
# Key of a run -> keys of the manifest that determine it; None if no key does.
_SET_BY_BENCHMARK = {
    "output_dir": None,
    "model": "`model` and `demonstrations`",
    "env": "`environments`",
    "seed": "`seeds`",
    "data": "`demonstrations`",
    "eval_data": "`demonstrations`",
    "evaluation": "`episodes`, `decoding` and `curve_points`",
    "plugins": "`plugins` of the manifest",
    "resume": None,
    "overwrite": None,
}


def make_bench(tree: Mapping[str, Any], commands: CommandTable) -> Bench:
    """Build the benchmark that a manifest describes, and check the configuration of every run.

    Args:
        tree: Content of the manifest.
        commands: Commands that the runs use.

    Raises:
        UserError: A key, a name or a value is wrong; the message names it.
    """
    config = build_config(BenchConfig, tree)
    bench = Bench(
        config,
        _build_manifest_entries(BenchEnvironment, config.environments, "environments"),
        _build_manifest_entries(BenchAlgorithm, config.algorithms, "algorithms"),
        commands,
    )
    _check_demonstrations(bench)
    _check_policies(bench)
    _check_algorithms(bench)
    for name, task in bench.environments.items():
        _refuse_benchmark_keys(f"environments.{name}.run", task.run)
        _refuse_benchmark_keys(f"environments.{name}.sft", task.sft)
        _check_run_configs(bench, name)
    return bench


def _build_manifest_entries(cls: type[T], items: Mapping[str, Any], group: str) -> dict[str, T]:
    """Build the entries of the manifest's group `environments` or `algorithms`.

    Raises:
        UserError: A name cannot be the name of a folder, or an entry is wrong.
    """
    for name in items:
        if not _is_valid_entry_name(name):
            raise UserError(
                f"{group}: {name!r} is not a valid folder name: use letters, digits and . + - _, "
                "begin with a letter or a digit, and do not use 'seed'"
            )
    return {
        name: build_manifest_entry(cls, item, f"{group}.{name}") for name, item in items.items()
    }


def _is_valid_entry_name(name: Any) -> bool:
    """Return whether a name can be that of a folder and does not look like a training seed."""
    return bool(_FOLDER_NAME.fullmatch(str(name))) and "seed" not in str(name)


def build_manifest_entry(cls: type[T], item: Any, key: str) -> T:
    """Build a configuration of class `cls` from a mapping; `key` is named in error messages."""
    if item is not None and not isinstance(item, Mapping):
        known = ", ".join(field.name for field in fields(cls))  # type: ignore[arg-type]
        raise UserError(f"{key}: expected a mapping with {known}; got {item!r}")
    try:
        return build_config(cls, item or {})
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _check_demonstrations(bench: Bench) -> None:
    """Check the demonstrations of the environments, the settings that depend on them, and `run`."""
    without = [name for name, task in bench.environments.items() if task.demonstrations is None]
    if without and bench.config.model.scratch:
        raise UserError(
            "model.scratch: a model with random weights must first be trained on demonstrations; "
            f"give demonstrations for {', '.join(without)}"
        )
    if len(without) == len(bench.environments) and bench.config.sft:
        raise UserError("sft has no effect without demonstrations")
    _refuse_benchmark_keys("sft", bench.config.sft)
    _refuse_benchmark_keys("run", bench.config.run)


def _check_policies(bench: Bench) -> None:
    """Check the names of the policies that are not trained, and that they need no training.

    Raises:
        UserError: A name is reserved, used or not valid, or a policy has a wrong key or a model.
    """
    for name, item in bench.config.policies.items():
        key = f"policies.{name}"
        if name in _RESERVED_NAMES or name in bench.algorithms or not _is_valid_entry_name(name):
            raise UserError(
                f"policies: {name!r} is reserved, the name of an algorithm, or no valid folder "
                "name; choose another name"
            )
        named_item = {"name": name, **item} if isinstance(item, Mapping) else item
        spec = build_manifest_entry(PolicySpec, named_item, key)
        if spec.model is not None or spec.examples:
            raise UserError(
                f"{key}: give path or api, without model and examples; a benchmark trains its "
                "models"
            )


def _check_algorithms(bench: Bench) -> None:
    """Check the names, commands and `run` keys of the algorithms, and the name of the baseline."""
    for name, entry in bench.algorithms.items():
        command = bench.command_of(name)
        if name in _RESERVED_NAMES:
            raise UserError(f"algorithms: the name {name!r} is reserved; choose another name")
        if command not in registry.ALGORITHMS:
            raise UserError(
                f"algorithms.{name}: {command!r} is not an online algorithm"
                f"{did_you_mean(command, registry.ALGORITHMS)}"
            )
        _refuse_benchmark_keys(f"algorithms.{name}.run", entry.run)
    everywhere = [
        row
        for row in bench.untrained_rows
        if all(row in bench.untrained_rows_of(name) for name in bench.environments)
    ]
    methods = [*everywhere, bench.initial_row_name, *bench.algorithms]
    if bench.baseline not in methods:
        raise UserError(
            f"baseline: there is no row {bench.baseline!r}{did_you_mean(bench.baseline, methods)}"
        )


def _check_run_configs(bench: Bench, environment: str) -> None:
    """Check the keys, types and settings of the runs of an environment with the first seed."""
    seed = bench.config.seeds[0]
    for command, tree in bench.initial_model_job(environment, seed).stages:
        try:
            # The options of TRL are checked when the run starts, because the import of TRL takes
            # many seconds.
            build_config(
                OfflineConfig, tree
            ) if command == "sft" else bench.commands.config_from_tree(command, tree)
        except UserError as error:
            raise UserError(f"environments.{environment}, {command}: {error}") from error
    for name in bench.algorithms:
        command = bench.command_of(name)
        try:
            config = bench.commands.config_from_tree(
                command, bench.run_config_tree(environment, name, seed)
            )
            algorithm_of(command, config)
            if config.num_steps % bench.config.curve_points:
                raise ValueError(
                    f"num_steps must be a multiple of curve_points, got {config.num_steps} and "
                    f"{bench.config.curve_points}"
                )
        except ValueError as error:
            raise UserError(f"{name} on {environment}: {error}") from error


def _refuse_benchmark_keys(path: str, tree: Mapping[str, Any]) -> None:
    """Raise UserError if `tree` contains a key that the benchmark sets itself.

    `path` is the key of `tree`, for error messages.
    """
    for key in tree:
        if key in _SET_BY_BENCHMARK:
            owner = _SET_BY_BENCHMARK[key]
            advice = f"use {owner} instead" if owner else "remove the key"
            raise UserError(f"{path}.{key} is set by the benchmark: {advice}")
