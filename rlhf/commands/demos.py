"""Implements `rlhf demos` and `rlhf envs demos`, which write demonstrations and pairs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.common.names import FILE_NAME_RULE, is_file_name
from rlhf.common.ranges import Fraction, PositiveInt, Seed
from rlhf.config.base import CommandConfig, RunConfig
from rlhf.errors import UserError
from rlhf.runs.directory import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemosFile:
    """A file of demonstrations or preference pairs to write."""

    path: str
    """Name of the JSONL file in the run directory."""
    kind: Literal["sft", "preference"]
    """Kind of the rows. sft: demonstrations; preference: pairs of actions, in which the action with
    the higher optimal value is preferred."""
    count: PositiveInt
    """Number of rows."""
    quality: Fraction = 1.0
    """Probability that the expert chooses an action; otherwise the action is random."""


@dataclass(frozen=True)
class DemosConfig(RunConfig):
    """Configuration of `rlhf demos`: an environment and the files to write."""

    env: str
    """Gymnasium id of one of the toolkit's environments."""
    files: list[DemosFile]
    """Files to write."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""

    def __post_init__(self) -> None:
        for file in self.files:
            if not is_file_name(file.path):
                raise ValueError(f"files: {file.path!r} is not a file name ({FILE_NAME_RULE})")


@dataclass(frozen=True, kw_only=True)
class EnvDemosConfig(CommandConfig, DemosFile):
    """Configuration of `rlhf envs demos`: an environment and one file to write."""

    env: str
    """Gymnasium id of one of the toolkit's environments."""
    path: str
    """Path of the JSONL file to write."""
    kind: Literal["sft", "preference"] = "sft"
    count: PositiveInt = 100
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    seed: Seed = 0
    """Random seed of initial states and random actions."""


def write_env_demos(config: EnvDemosConfig) -> Iterator[str]:
    """Write the file; yield a line with its path, numbers of rows and episodes, and mean return.

    Raises:
        UserError: The file exists, or the environment cannot write such rows.
    """
    from rlhf.envs.demonstrations import write_demonstrations

    if Path(config.path).exists():
        raise UserError(f"{config.path} exists already: choose a different --path")
    summary = write_demonstrations(
        config.env,
        config.path,
        count=config.count,
        quality=config.quality,
        seed=config.seed,
        kind=config.kind,
        **config.kwargs,
    )
    yield f"{config.path}: {_summary_line(summary)}"


def write_demos_into_run(command: str, config: DemosConfig, run: Run) -> Path:
    """Write every file of the configuration; return the run directory."""
    from rlhf.envs.demonstrations import write_demonstrations

    run.declare_files(file.path for file in config.files)
    for number, file in enumerate(config.files):
        summary = write_demonstrations(
            config.env,
            run.directory / file.path,
            count=file.count,
            quality=file.quality,
            seed=config.seed * len(config.files) + number,
            kind=file.kind,
            **config.kwargs,
        )
        log.info("%s: %s", file.path, _summary_line(summary))
    return run.directory


def _summary_line(summary: Mapping[str, Any]) -> str:
    """Return the numbers of rows and episodes and the mean return of a file as text."""
    line = f"{summary['rows']} rows from {summary['episodes']} episodes"
    mean = summary["mean_return"]
    return line if mean is None else f"{line}, mean return {mean:.3g}"
