"""The commands as Python functions, for scripts and notebooks.

    import rlhf

    rlhf.stage("sft", {"output_dir": "runs/sft", "model": {...}, "data": [...]})
    rlhf.run("configs/quickstart.yaml", seed=3, output_dir="runs/mine")
    rlhf.evaluate({"output_dir": "runs/eval", ...})
    rlhf.report("runs/mine")

A configuration is a mapping, a path to a YAML file, or a list of mappings and paths. In a list,
later entries take precedence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.api.options import Config
from rlhf.api.table import as_sources, command_table

if TYPE_CHECKING:
    from rlhf.evaluation.compare import Comparison

Directory = str | os.PathLike[str]
"""A run or pipeline directory, or a `Run`."""


def stage(command: str, config: Config | Sequence[Config], **overrides: Any) -> Path:
    """Run a command that writes a run directory, such as sft, reward, dpo, ppo, grpo or demos.

    Args:
        command: Name of the command on the command line (`rlhf --help`).
        config: A mapping, the path of a YAML file, or a list of mappings and paths.
        overrides: Configuration keys and values that replace values in ``config``. Pass nested keys
            as ``**{"model.path": "..."}``.

    Returns:
        The folder of the trained model, or the run directory if the command does not train a model.

    Raises:
        UserError: The configuration or the data are invalid, or the directory cannot be used.
    """
    commands = command_table()
    checked = commands.read(command, as_sources(config), list(overrides.items()))
    return commands.run_config(command, checked)


def run(pipeline: str | Path, **overrides: Any) -> Path:
    """Run the pipeline in a YAML file; return the path of the pipeline's report."""
    commands = command_table()
    from rlhf.pipeline import run_pipeline

    return run_pipeline(commands.read("run", [pipeline], list(overrides.items())), commands)


def evaluate(config: Config | Sequence[Config], **overrides: Any) -> Path:
    """Evaluate policies and rewards; return the run directory."""
    return stage("evaluate", config, **overrides)


def report(*directories: Directory) -> Path:
    """Write an HTML report; return its path.

    Args:
        directories: Run or pipeline directories. For one directory, its report is written. For
            several directories, a comparison is written to ``comparison.html`` in the working
            directory.
    """
    from rlhf.reports import write_comparison_report, write_report

    folders = [Path(directory) for directory in directories]
    if len(folders) == 1:
        return write_report(folders[0])
    return write_comparison_report(folders, Path("comparison.html"))


def compare(*directories: Directory, metric: str | None = None) -> Comparison:
    """Compare runs by a metric of their evaluations.

    Args:
        directories: Run or pipeline directories, or runs.
        metric: Metric, as for `rlhf compare`.

    Returns:
        Paired differences between the runs, each with a confidence interval and a sentence that
        states whether the difference is significant.
    """
    from rlhf.evaluation.compare import compare as compare_runs

    return compare_runs([Path(directory) for directory in directories], metric=metric)


def generate(config: Config | Sequence[Config], **overrides: Any) -> list[str]:
    """Sample completions from a model; return the lines that `rlhf generate` prints."""
    return _run_and_collect_lines("generate", config, overrides)


def score(config: Config | Sequence[Config], **overrides: Any) -> list[str]:
    """Score conversations with a reward; return the lines that `rlhf score` prints."""
    return _run_and_collect_lines("score", config, overrides)


def _run_and_collect_lines(
    command: str, config: Config | Sequence[Config], overrides: Mapping[str, Any]
) -> list[str]:
    commands = command_table()
    checked = commands.read(command, as_sources(config), list(overrides.items()))
    return list(commands.run_and_yield_text(command, checked))
