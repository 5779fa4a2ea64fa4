"""Configuration of `rlhf sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.common.ranges import Seed
from rlhf.config.base import DirectoryConfig
from rlhf.config.launcher import LauncherConfig


@dataclass(frozen=True)
class SweepConfig(DirectoryConfig):
    """Sweep of `rlhf sweep`: a run of a training command for each setting and seed.

    output_dir: runs/sft-sweep
    run_command: sft
    base: [configs/sft.yaml]
    grid: {trainer.learning_rate: [1.0e-5, 1.0e-4], batch_size: [16, 32]}
    seeds: [0, 1, 2, 3, 4]
    metric: eval/loss
    """

    run_command: str
    """Training command of the runs, such as sft, reward, dpo or ppo."""
    grid: dict[str, list[Any]]
    """Dotted configuration key of the command -> values. A setting is a combination of one value
    of each key, and all combinations are run."""
    metric: str
    """Metric by which settings are compared, as logged in metrics.jsonl (docs/metrics.md). The last
    logged value of a run counts. A setting with a value that is not finite is ranked last."""
    base: list[str] = field(default_factory=list)
    """Configuration files of the command for all runs. Later files take precedence."""
    run: dict[str, Any] = field(default_factory=dict)
    """Configuration keys of all runs, which take precedence over `base`."""
    seeds: list[Seed] = field(default_factory=lambda: [0])
    """Training seeds of every setting."""
    goal: Literal["minimize", "maximize"] = "minimize"
    """Whether a lower or a higher value of the metric is better."""

    def __post_init__(self) -> None:
        if not self.metric.strip():
            raise ValueError("metric: give the name of a logged metric, e.g. eval/loss")
        for name in ("grid", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name}: there are no entries; give at least one")
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key}: there are no values; give at least one")
            if any(values.count(value) > 1 for value in values):
                raise ValueError(f"grid.{key}: a value occurs twice")
            for other in self.grid:
                if other.startswith(f"{key}."):
                    raise ValueError(f"grid.{key} contains grid.{other}: remove one of them")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different, got {self.seeds}")
        set_here = {"output_dir", "seed", "resume", "overwrite"}
        for key in [*self.grid, *self.run]:
            if key.split(".")[0] in set_here:
                advice = "use `seeds`" if key == "seed" else "remove the key"
                raise ValueError(f"{key} is set by the sweep: {advice}")


@dataclass(frozen=True)
class SweepCommandConfig(LauncherConfig, SweepConfig):
    """Configuration of `rlhf sweep`: a sweep, and the launcher of its jobs.

    rlhf sweep SWEEP.yaml --jobs 2 --resume
    rlhf sweep SWEEP.yaml --launcher slurm --gpus-per-job 1
    """

    def __post_init__(self) -> None:
        SweepConfig.__post_init__(self)
        LauncherConfig.__post_init__(self)
