"""Read a benchmark's manifest and check the configuration of every run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from rlhf.algorithms import registry
from rlhf.commands.command import CommandTable
from rlhf.common.names import nearest
from rlhf.config.bench import BenchAlgorithm, BenchConfig, BenchEnvironment
from rlhf.config.load import build
from rlhf.config.offline import OfflineConfig
from rlhf.config.online import algorithm_of
from rlhf.errors import UserError
from rlhf.studies.bench.plan import Bench

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
# Reserved names, which other folders and rows have.
_RESERVED = ("demos", "demos-held-out", "sft", "model", "evaluate", "random", "expert")
_OWNED = {
    "output_dir": "the benchmark",
    "model": "`model` and the demonstrations",
    "env": "`environments`",
    "seed": "`seeds`",
    "data": "the demonstrations",
    "eval_data": "the demonstrations",
    "evaluation": "`episodes`, `decoding` and `curve_points`",
    "resume": "the benchmark",
    "overwrite": "the benchmark",
}


def make_bench(tree: Mapping[str, Any], commands: CommandTable) -> Bench:
    """Make a manifest from plain data and check every run's configuration.

    Raises:
        UserError: a key is wrong; the message names the environment or algorithm and the key.
    """
    config = build(BenchConfig, tree)
    bench = Bench(
        config,
        _entries(BenchEnvironment, config.environments, "environments"),
        _entries(BenchAlgorithm, config.algorithms, "algorithms"),
        commands,
    )
    _check_starts(bench)
    _check_algorithms(bench)
    for name, task in bench.environments.items():
        _refuse_owned_keys(f"environments.{name}.run", task.run)
        _refuse_owned_keys(f"environments.{name}.sft", task.sft)
        _check_runs(bench, name)
    return bench


def _entries(cls: type[T], items: Mapping[str, Any], group: str) -> dict[str, T]:
    """Build the entries of a group of the manifest; their names become folders."""
    for name in items:
        if not _NAME.fullmatch(str(name)) or "seed" in str(name):
            raise UserError(
                f"{group}: {name!r} is not a folder name (letters, digits, . + - _, without 'seed')"
            )
    return {name: build_entry(cls, item, f"{group}.{name}") for name, item in items.items()}


def build_entry(cls: type[T], item: Any, key: str) -> T:
    """Build a configuration from a mapping; `key` is its key, for error messages."""
    if item is not None and not isinstance(item, Mapping):
        known = ", ".join(field.name for field in fields(cls))  # type: ignore[arg-type]
        raise UserError(f"{key}: expected a mapping with {known}; got {item!r}")
    try:
        return build(cls, item or {})
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _check_starts(bench: Bench) -> None:
    """Check that all environments have demonstrations or none has, so that rows are comparable."""
    kinds = {task.demonstrations is None for task in bench.environments.values()}
    if len(kinds) > 1:
        raise UserError("environments: give demonstrations to all of them or to none")
    if kinds == {True} and bench.config.model.scratch:
        raise UserError("model.scratch: random weights need demonstrations to start from")
    if kinds == {True} and bench.config.sft:
        raise UserError("sft has no effect without demonstrations")
    _refuse_owned_keys("sft", bench.config.sft)
    _refuse_owned_keys("run", bench.config.run)


def _check_algorithms(bench: Bench) -> None:
    for name, entry in bench.algorithms.items():
        command = bench.command(name)
        if name in _RESERVED:
            raise UserError(f"algorithms: {name!r} is the name of another row; choose another")
        if command not in registry.ALGORITHMS:
            raise UserError(
                f"algorithms.{name}: {command!r} is not an online algorithm"
                f"{nearest(command, registry.ALGORITHMS)}"
            )
        _refuse_owned_keys(f"algorithms.{name}.run", entry.run)
    methods = [*bench.config.references, bench.start, *bench.algorithms]
    if bench.baseline not in methods:
        raise UserError(
            f"baseline: there is no {bench.baseline!r}{nearest(bench.baseline, methods)}"
        )


def _check_runs(bench: Bench, environment: str) -> None:
    """Check keys, types and settings of an environment's runs."""
    seed = bench.config.seeds[0]
    for command, tree in bench.start_job(environment, seed).stages:
        try:
            # TRL's own options are checked by the run, because importing TRL takes many seconds.
            build(OfflineConfig, tree) if command == "sft" else bench.commands.configure(
                command, tree
            )
        except UserError as error:
            raise UserError(f"environments.{environment}, {command}: {error}") from error
    for name in bench.algorithms:
        command = bench.command(name)
        try:
            config = bench.commands.configure(command, bench.run_tree(environment, name, seed))
            algorithm_of(command, config)
            if config.num_steps % bench.config.curve_points:
                raise ValueError(
                    f"num_steps must be a multiple of curve_points, got {config.num_steps} and "
                    f"{bench.config.curve_points}"
                )
        except ValueError as error:
            raise UserError(f"{name} on {environment}: {error}") from error


def _refuse_owned_keys(path: str, tree: Mapping[str, Any]) -> None:
    """Raise UserError for keys that the benchmark sets."""
    for key in tree:
        if key in _OWNED:
            raise UserError(f"{path}.{key} is set by {_OWNED[key]}: use that instead")
