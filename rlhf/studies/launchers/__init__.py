"""Start the jobs of a study: in local processes, in job arrays of Slurm, or in tasks of Ray.

A launcher is a class that follows `rlhf.studies.launchers.base.Launcher`, and an entry of
`LAUNCHERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlhf.commands.command import CommandTable
from rlhf.common.imports import import_object
from rlhf.config.launcher import LauncherConfig
from rlhf.studies.launchers.base import Launcher

LAUNCHERS = {
    "local": "rlhf.studies.launchers.local:LocalLauncher",
    "slurm": "rlhf.studies.launchers.slurm:SlurmLauncher",
    "ray": "rlhf.studies.launchers.ray_cluster:RayLauncher",
}
"""Name of a launcher -> its class, which is imported when it is used."""


def make_launcher(config: LauncherConfig, commands: CommandTable, root: Path) -> Launcher:
    """Return the launcher that a configuration names.

    Args:
        config: Configuration of the launcher.
        commands: Commands of the jobs.
        root: Directory of the study; the output of the jobs is written to its folder ``logs``.

    Raises:
        UserError: The launcher needs a program or a package that is not installed.
    """
    launcher: Callable[..., Launcher] = import_object(LAUNCHERS[config.launcher])
    return launcher(config, commands, root)
