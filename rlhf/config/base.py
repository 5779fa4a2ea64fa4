"""Base classes with the configuration keys that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.common.ranges import PositiveInt, Seed
from rlhf.config.model import ModelSpec
from rlhf.runs.alarms import AlarmAction, AlarmName, check_alarm_actions
from rlhf.runs.trackers import TrackerName


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """Base of the configurations of all commands that can use plug-ins."""

    plugins: list[str] = field(default_factory=list)
    """Plug-ins that add algorithms, rewards and other parts (docs/extending.md): modules, or Python
    files relative to the configuration file. They are imported before the other keys are
    checked."""


@dataclass(frozen=True, kw_only=True)
class DirectoryConfig(CommandConfig):
    """Base of the configurations of commands that write a directory."""

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
    """Seed from which all random numbers of the run are derived."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """Base of the configurations of commands that train a model."""

    model: ModelSpec
    """Initial model of training. It is also the reference model if the method uses one."""
    track: list[TrackerName] = field(default_factory=list)
    """Experiment trackers to log to: tensorboard, wandb, trackio, mlflow, or a tracker
    of a plug-in."""
    callbacks: list[Any] = field(default_factory=list)
    """Code that runs after steps, evaluations, checkpoints and training: file.py:name, module:name,
    the name of a registered callback, or {callback: file.py:name, ...} with keyword arguments
    (docs/extending.md)."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep. If the last one is damaged, a run resumes from the
    previous one."""
    alarms: dict[AlarmName, AlarmAction] = field(default_factory=dict)
    """Alarm -> action: halt (end training), warn, or state (mention in the report only). Alarms
    without an entry have the default action in docs/training.md."""
    allow_changes: list[str] = field(default_factory=list)
    """With resume: keys, such as [optimizer.learning_rate], that may differ from the recorded
    configuration of the run. The changes are recorded (docs/training.md). More steps are always
    permitted."""
    activation_checkpointing: bool = False
    """Recompute the activations of each transformer block in the backward pass, which needs less
    memory and more time."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: with several processes, divide the weights, gradients and optimizer states among them
    (FSDP2), so that each process needs less memory. none: every process holds the whole model
    (docs/scaling.md)."""
    profile: bool = False
    """Also log throughput, FLOPS utilization, padding and peak memory (docs/metrics.md)."""

    def __post_init__(self) -> None:
        if self.model.dtype == "float16":
            raise ValueError(
                "model.dtype: gradients underflow in float16; train in bfloat16 or float32 "
                "(rlhf evaluate and rlhf generate support float16)"
            )
        check_alarm_actions(self.alarms)
        if self.allow_changes and not self.resume:
            raise ValueError("allow_changes has no effect without resume: add --resume")
