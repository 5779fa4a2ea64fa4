"""Configuration keys that all runs have."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf.common.ranges import PositiveInt, Seed
from rlhf.config.model import ModelSpec
from rlhf.runs.alarms import Action, AlarmName, check_actions
from rlhf.runs.trackers import TrackerName


@dataclass(frozen=True, kw_only=True)
class DirectoryConfig:
    """Base of commands that write a directory: its path, and what happens if it exists."""

    output_dir: str
    """Directory to write."""
    resume: bool = False
    """Continue in an existing output_dir, from its last checkpoint."""
    overwrite: bool = False
    """Replace an existing output_dir."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(DirectoryConfig):
    """Base of the configurations of commands that write a run directory."""

    seed: Seed = 0
    """Random seed, from which all random numbers of the run derive."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """Base of the configurations of commands that train a model."""

    model: ModelSpec
    """The model that training starts from; also the reference, if the method has one."""
    track: list[TrackerName] = field(default_factory=list)
    """Experiment trackers to log to: tensorboard, wandb, trackio, mlflow."""
    keep_last: PositiveInt = 2
    """Number of checkpoints to keep; if the last is damaged, the one before it is used."""
    alarms: dict[AlarmName, Action] = field(default_factory=dict)
    """Alarm -> action that replaces the default in docs/training.md: halt, warn, or state
    (report)."""
    profile: bool = False
    """Also log throughput, FLOP utilization, padding and peak memory (docs/metrics.md)."""

    def __post_init__(self) -> None:
        if self.model.dtype == "float16":
            raise ValueError(
                "model.dtype: gradients underflow in float16; train in bfloat16 or float32 "
                "(evaluate and generate take float16)"
            )
        check_actions(self.alarms)
