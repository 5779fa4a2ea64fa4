"""Configuration of the launcher, which starts the jobs of a study."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from rlhf.common.ranges import PositiveInt

LauncherName = Literal["local", "slurm", "ray"]


@dataclass(frozen=True, kw_only=True)
class LauncherConfig:
    """Configuration of the launcher of a study's jobs. The results do not depend on it."""

    launcher: LauncherName = "local"
    """Program that starts the jobs: local (processes on this machine), slurm (job arrays), or ray
    (tasks of a Ray cluster)."""
    jobs: PositiveInt | None = None
    """Maximum number of jobs that run at the same time. The default is 1 with the launcher local;
    with slurm and ray, only the cluster limits the number by default."""
    cpus_per_job: PositiveInt | None = None
    """Number of CPU cores of a job. By default, the launcher local divides the cores of this
    machine by the number of jobs, and slurm and ray reserve one core."""
    gpus_per_job: PositiveInt | None = None
    """Number of GPUs of a job, with slurm or ray. By default, a job reserves no GPU."""
    sbatch_options: list[str] = field(default_factory=list)
    """Additional options of sbatch, such as [--partition=long, --time=8:00:00], with slurm."""
    ray_address: str | None = None
    """Address of the Ray cluster, such as auto or host:6379, with ray. By default, Ray uses
    the cluster at RAY_ADDRESS, or starts one on this machine."""

    def __post_init__(self) -> None:
        for name, launchers in _LAUNCHERS_BY_KEY.items():
            if getattr(self, name) and self.launcher not in launchers:
                raise ValueError(
                    f"{name} has no effect with the launcher {self.launcher}; it is used by "
                    f"{' and '.join(launchers)}"
                )
        for option in self.sbatch_options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"sbatch_options: {option!r} is not an option; write --name=value")
            name = option.split("=")[0]
            if name in _OPTIONS_SET_BY_LAUNCHER:
                raise ValueError(f"sbatch_options: {name} is set by the launcher")


_LAUNCHERS_BY_KEY = {
    "gpus_per_job": ("slurm", "ray"),
    "sbatch_options": ("slurm",),
    "ray_address": ("ray",),
}
_OPTIONS_SET_BY_LAUNCHER = frozenset(
    [
        *("-a", "--array", "-c", "--cpus-per-task", "-D", "--chdir", "-e", "--error"),
        *("-J", "--job-name", "-o", "--output", "--parsable", "-W", "--wait", "--wrap"),
    ]
)

LAUNCHER_KEYS = frozenset(item.name for item in fields(LauncherConfig))
"""Keys that may differ between a study and its resumption."""


def without_launcher_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a study, as plain data, without the keys of its launcher."""
    return {key: value for key, value in tree.items() if key not in LAUNCHER_KEYS}
