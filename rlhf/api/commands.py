"""Python functions for the commands that have no function with typed arguments.

A configuration is a mapping, a path to a YAML file, or a list of mappings and paths. In a list,
later entries take precedence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.api.options import Config
from rlhf.api.table import as_config_sources, load_command_table
from rlhf.common.guards import is_path
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.evaluation.compare import Comparison

Directory = str | os.PathLike[str]
"""A run or pipeline directory, or a `Run`."""


def stage(command: str, config: Config | Sequence[Config], **overrides: Any) -> Path:
    """Run a command that writes a run directory, such as sft, reward, dpo, ppo, grpo or demos.

    Example:
        >>> files = [{"path": "demos.jsonl", "kind": "sft", "count": 4}]
        >>> folder = rlhf.stage(
        ...     "demos", {"env": "text/Echo-v0", "files": files}, output_dir="runs/demos"
        ... )
        >>> len((folder / "demos.jsonl").read_text().splitlines())
        4

    Args:
        command: Name of the command on the command line (`rlhf --help`).
        config: A mapping, the path of a YAML file, or a list of mappings and paths.
        overrides: Configuration keys and values that replace values in ``config``. Pass nested keys
            as ``**{"model.path": "..."}``.

    Returns:
        The path of the result: the folder of the trained model, the run directory, or a page of the
        results.

    Raises:
        UserError: The configuration or the data are invalid, or the directory cannot be used.
        Halt: An alarm ended training.
    """
    commands = load_command_table()
    checked = commands.read_config(command, as_config_sources(config), list(overrides.items()))
    return commands.run_command_with_config(command, checked)


def run(pipeline: str | Path, **overrides: Any) -> Path:
    """Run the pipeline in a YAML file (`rlhf run`).

    Example:
        >>> from pathlib import Path
        >>> _ = Path("both.yaml").write_text('''
        ... output_dir: runs/both
        ... stages:
        ... - name: judged
        ...   command: evaluate
        ...   env: {id: text/Echo-v0}
        ...   policies: [{name: random}, {name: expert}]
        ... ''')
        >>> rlhf.run("both.yaml").as_posix()
        'runs/both/report.html'

    Args:
        pipeline: Path of the YAML file.
        overrides: See `stage`.

    Returns:
        The path of the pipeline's report.

    Raises:
        UserError: The configuration or the data are invalid, or the directory cannot be used.
        Halt: An alarm ended training.
    """
    commands = load_command_table()
    from rlhf.pipeline import run_pipeline

    return run_pipeline(commands.read_config("run", [pipeline], list(overrides.items())), commands)


def report(*directories: Directory) -> Path:
    """Write an HTML report (`rlhf report`).

    Example:
        >>> policies = {"random": None, "expert": None}
        >>> run = rlhf.evaluate(policies=policies, env="text/Echo-v0", episodes=8)
        >>> rlhf.report(run).as_posix()
        'runs/evaluate/report.html'

    Args:
        directories: Run or pipeline directories. For one directory, its report is written. For
            several directories, a comparison is written to ``comparison.html`` in the working
            directory.

    Returns:
        The path of the report.

    Raises:
        UserError: No directory is given, a directory contains no run, or the report would replace a
            file of the user.
    """
    from rlhf.reports import write_comparison_report, write_report

    folders = _convert_to_paths("report", directories)
    if len(folders) == 1:
        return write_report(folders[0])
    return write_comparison_report(folders, Path("comparison.html"))


def compare(*directories: Directory, metric: str | None = None) -> Comparison:
    """Compare runs by a metric of their evaluations (`rlhf compare`).

    Example:
        >>> policies = {"random": None, "expert": None}
        >>> run = rlhf.evaluate(policies=policies, env="text/Echo-v0", episodes=8)
        >>> comparison = rlhf.compare(run, metric="success")
        >>> {row.method: row.estimate.value for row in comparison.rows}["expert"]
        1.0

    Args:
        directories: Run or pipeline directories, or runs.
        metric: Metric, as for `rlhf compare`.

    Returns:
        The scores of the runs, and their paired differences, each with a confidence interval and a
        sentence that states whether the difference is significant.

    Raises:
        UserError: No directory is given, a directory contains no run or is given twice, no episodes
            were evaluated, the metric does not exist, or the runs share an environment, but no
            training seeds or no evaluation seeds.
    """
    from rlhf.evaluation.compare import compare as compare_runs

    return compare_runs(_convert_to_paths("compare", directories), metric=metric)


def generate(config: Config | Sequence[Config], **overrides: Any) -> list[str]:
    """Sample completions from a model; return the lines that `rlhf generate` prints.

    `Run.policy` samples from the model of a run without loading it for each call.

    Example:
        >>> size = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
        >>> lines = rlhf.generate(
        ...     {"model": {"scratch": size}, "rollout": {"max_new_tokens": 4}},
        ...     prompt="Hello",
        ...     samples=2,
        ... )
        >>> len(lines)
        2

    Args:
        config: See `stage`.
        overrides: See `stage`.

    Raises:
        UserError: The configuration or the data are invalid.
    """
    return _run_and_collect_lines("generate", config, overrides)


def score(config: Config | Sequence[Config], **overrides: Any) -> list[str]:
    """Score conversations with a reward; return the lines that `rlhf score` prints.

    `rlhf.reward_models.build` returns a reward as a function of conversations.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> _ = Path("talk.jsonl").write_text('{"prompt": "6*7?", "completion": "42"}')
        >>> lines = rlhf.score(
        ...     {"rewards": [{"kind": "exact_match", "answer": "42"}]}, input="talk.jsonl"
        ... )
        >>> json.loads(lines[0])["score"]
        1.0

    Args:
        config: See `stage`.
        overrides: See `stage`.

    Raises:
        UserError: The configuration or the data are invalid.
    """
    return _run_and_collect_lines("score", config, overrides)


def _convert_to_paths(function_name: str, directories: Sequence[Directory]) -> list[Path]:
    """Return the directories that were given to a function.

    Raises:
        UserError: No directory is given, or one is not a path.
    """
    other = [type(item).__name__ for item in directories if not is_path(item)]
    if other or not directories:
        raise UserError(
            f"{function_name}: expected runs or paths of their directories, got "
            f"{other[0] if other else 'none'}; write rlhf.{function_name}(first, second)"
        )
    return [Path(directory) for directory in directories]


def _run_and_collect_lines(
    command: str, config: Config | Sequence[Config], overrides: Mapping[str, Any]
) -> list[str]:
    commands = load_command_table()
    checked = commands.read_config(command, as_config_sources(config), list(overrides.items()))
    return list(commands.run_and_yield_text(command, checked))
