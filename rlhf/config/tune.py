"""Configuration of `rlhf tune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Interval

from rlhf.common.ranges import AtLeastTwo, Finite, PositiveInt, Seed
from rlhf.config.base import DirectoryConfig
from rlhf.config.launcher import LauncherConfig


@dataclass(frozen=True)
class Dimension:
    """The search space of one key: a range or a list of values."""

    low: Finite | None = None
    """Minimum of a range."""
    high: Finite | None = None
    """Maximum of a range."""
    log: bool = False
    """Whether to search a range uniformly in the logarithm of the value."""
    choices: list[Any] = field(default_factory=list)
    """Values to try. Give either this list or a range."""

    def __post_init__(self) -> None:
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise ValueError("give either low and high, or choices")
        if self.choices:
            if self.log:
                raise ValueError("log has no effect with choices")
        elif self.low is None or self.high is None or self.low >= self.high:
            raise ValueError(
                f"low must be below high, and both are needed: got low={self.low}, high={self.high}"
            )
        elif self.log and self.low <= 0:
            raise ValueError(f"low must be > 0 with log, got {self.low}")


@dataclass(frozen=True)
class TuneConfig(DirectoryConfig):
    """Study of `rlhf tune`, with the same number of trials for each algorithm of a benchmark."""

    bench: str
    """Path of the benchmark's manifest, which defines the model, environments and algorithms."""
    space: dict[str, Any]
    """Dotted configuration key of a run -> mapping with low, high and log, or with choices."""
    seeds: list[Seed]
    """Training seeds of every trial; they must differ from the benchmark's seeds."""
    trials: PositiveInt = 20
    """Number of trials for each algorithm."""
    environments: list[str] = field(default_factory=list)
    """Environments of the manifest over which a trial's score is averaged. By default, all
    environments are used."""
    episodes: AtLeastTwo = 128
    """Number of held-out episodes for a trial's score; the benchmark uses different episodes."""
    sampler_seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0
    """Random seed of the search."""

    def __post_init__(self) -> None:
        for name in ("space", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name}: there are no entries; give at least one")


@dataclass(frozen=True)
class TuneCommandConfig(LauncherConfig, TuneConfig):
    """Configuration of `rlhf tune`: a study, and the launcher of its jobs.

    rlhf tune STUDY.yaml --jobs 2 --resume
    rlhf bench MANIFEST.yaml --config runs/tune/tuned.yaml
    """

    def __post_init__(self) -> None:
        TuneConfig.__post_init__(self)
        LauncherConfig.__post_init__(self)
