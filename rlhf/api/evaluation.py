"""Define `evaluate`; its policies, rewards and data can also be Python objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from rlhf.api.inputs import to_evaluation_config
from rlhf.api.options import Config, EvaluationOptions, show_options_in_signature
from rlhf.api.results import Run
from rlhf.api.table import as_config_sources, load_command_table


@show_options_in_signature(EvaluationOptions)
def evaluate(
    config: Config | Sequence[Config] | None = None, /, **options: Unpack[EvaluationOptions]
) -> Run:
    """Evaluate policies on episodes, texts, labels or tasks, and rewards on pairs.

    The function corresponds to `rlhf evaluate`.

    Example:
        >>> run = rlhf.evaluate(
        ...     policies={"random": None, "expert": None}, env="text/Echo-v0", episodes=8
        ... )
        >>> run.evaluations["expert"]["metrics"]["return"]["mean"]
        1.0

    Args:
        config: See `train`.
        options: See `train` and docs/evaluate.md. ``policies`` can be a mapping from names to
            policies. A policy is a value that ``model`` of `train` accepts, a function of messages
            or an ``ApiSpec``. For the names "random" and "expert", None selects the random or the
            expert policy of the environment. The default of ``output_dir`` is ``runs/evaluate``.

    Returns:
        The run, with the results as ``run.evaluations``.

    Raises:
        UserError: The configuration or the data are invalid, or the directory cannot be used.
    """
    commands = load_command_table()
    default = {"output_dir": "runs/evaluate"}
    sources = [default, *as_config_sources(config), to_evaluation_config(options)]
    checked = commands.read_config("evaluate", sources, [])
    commands.run_command_with_config("evaluate", checked)
    return Run(checked.output_dir)
