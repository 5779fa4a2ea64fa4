"""Stages that write data: demonstrations of an environment, and splits by prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.common.files import write_jsonl
from rlhf.config.data import DataSpec, Kind
from rlhf.data.load import load
from rlhf.data.splits import split_by_prompt
from rlhf.errors import UserError
from rlhf.runs.directory import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemosFile:
    """One file of demonstrations or preference pairs."""

    path: str
    """Name of the JSONL file in the run directory."""
    kind: Literal["sft", "preference"]
    """Demonstrations, or pairs from the optimal action values."""
    count: int
    """Rows."""
    quality: float = 1.0
    """How much of a demonstration is the expert's; the rest is random. In [0, 1]."""


@dataclass(frozen=True)
class DemosConfig:
    """`rlhf demos`: what an environment's expert would do, as training data."""

    output_dir: str
    """The run directory."""
    env: str
    """Gymnasium id of one of our environments."""
    files: list[DemosFile]
    """What to write."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    seed: int = 0
    """Of start states and random actions."""
    resume: bool = False
    """Accept an existing output_dir."""
    overwrite: bool = False
    """Replace an existing output_dir."""


@dataclass(frozen=True)
class SplitConfig:
    """`rlhf split`: one data set as train.jsonl and test.jsonl that share no prompt."""

    output_dir: str
    """The run directory."""
    data: list[DataSpec]
    """What to split."""
    kind: Kind
    """What the rows are."""
    test_fraction: float = 0.1
    """Share of rows in test.jsonl."""
    seed: int = 0
    """Of the split."""
    resume: bool = False
    """Accept an existing output_dir."""
    overwrite: bool = False
    """Replace an existing output_dir."""

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction must lie between 0 and 1, got {self.test_fraction}")


@dataclass(frozen=True)
class EnvDemosConfig:
    """`rlhf envs demos ID`: one file of demonstrations or pairs."""

    env: str
    """Gymnasium id of one of our environments."""
    path: str
    """The JSONL file to write."""
    kind: Literal["sft", "preference"] = "sft"
    """Demonstrations, or pairs from the optimal action values."""
    count: int = 100
    """Rows."""
    quality: float = 1.0
    """How much of a demonstration is the expert's; the rest is random. In [0, 1]."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    seed: int = 0
    """Of start states and random actions."""


def env_demos(config: EnvDemosConfig) -> Iterator[str]:
    """Write the file; yield what it holds."""
    from rlhf.envs.demonstrations import write_demonstrations

    if Path(config.path).exists():
        raise UserError(f"{config.path} exists already: choose another --path")
    summary = write_demonstrations(
        config.env,
        config.path,
        count=config.count,
        quality=config.quality,
        seed=config.seed,
        kind=config.kind,
        **config.kwargs,
    )
    yield f"{config.path}: {summary}"


def write_demos(verb: str, config: DemosConfig, run: Run) -> Path:
    """Write every file of the configuration; returns the run directory."""
    from rlhf.envs.demonstrations import write_demonstrations

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
        log.info("%s: %s", file.path, summary)
    return run.directory


def write_split(verb: str, config: SplitConfig, run: Run) -> Path:
    """Write train.jsonl and test.jsonl; returns the run directory."""
    loaded = load(config.data, config.kind, seed=config.seed)
    log.info("data: %s", loaded.summary())
    train, test = split_by_prompt(loaded.rows, fraction=config.test_fraction, seed=config.seed)
    for name, rows in (("train", train), ("test", test)):
        write_jsonl(run.directory / f"{name}.jsonl", rows)
        log.info("%s.jsonl: %d rows", name, len(rows))
    return run.directory
