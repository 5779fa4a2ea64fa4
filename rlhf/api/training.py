"""One function for each training command. The arguments are the keys of the configuration.

Values can be Python objects: a loaded model, an environment, a list of rows, a function as
reward. The functions and the command line use the same code: each call builds a configuration and
runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Unpack

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.api.inputs import to_training_config
from rlhf.api.options import (
    Config,
    OfflineOptions,
    OnlineOptions,
    RewardOptions,
    show_options_in_signature,
)
from rlhf.api.results import Run
from rlhf.api.table import as_config_sources, load_command_table


def train(command: str, config: Config | Sequence[Config] | None = None, /, **options: Any) -> Run:
    """Run a training command, such as that of a plug-in.

    Example:
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> run = rlhf.train("rloo", model=scratch, env="text/Echo-v0", num_steps=1)
        >>> run.finished
        True

    Args:
        command: Name of the command.
        config: Mapping, path of a YAML file, or a list of these; the other arguments take
            precedence.
        options: Keys of the configuration. ``model`` can be a hub id, a folder, a `Run`, or a
            loaded model together with ``tokenizer``. ``lora`` can be PEFT's ``LoraConfig``. ``env``
            can be a gymnasium id, an environment, a class or a factory. ``prompts`` and ``data``
            can be a path, a ``datasets.Dataset`` or a list of rows. A reward or a callback can be a
            function or an object. Configuration classes, such as
            `rlhf.config.online.OptimizerSpec`, can replace mappings. The default of ``output_dir``
            is ``runs/`` and the name of the command.

    Returns:
        The run.

    Raises:
        UserError: The configuration or the data are invalid, or the directory cannot be used.
        Halt: An alarm ended training.
    """
    commands = load_command_table()
    if command in commands:  # the configuration may name the plug-in that registers the command
        commands.check_command_makes_run(command)
    tree = to_training_config(options)
    sources = as_config_sources(config)
    # A given model or environment replaces that of the file, also if it is of another form.
    if sources and options.get("model") is not None:
        tree["model"] = {"path": None, "scratch": None, **tree["model"]}
    if sources and {"id", "prompts"} & set(tree.get("env", {})):
        tree["env"] = {"id": None, "prompts": [], **tree["env"]}
    default = {"output_dir": f"runs/{command}"}
    checked = commands.read_config(command, [default, *sources, tree], [])
    commands.run_command_with_config(command, checked)
    return Run(checked.output_dir)


@show_options_in_signature(OfflineOptions)
def sft(
    config: Config | Sequence[Config] | None = None, /, **options: Unpack[OfflineOptions]
) -> Run:
    """Fine-tune a model on demonstrations, rows with a prompt and a completion (`rlhf sft`).

    Example:
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> rows = [{"prompt": f"Say {i}", "completion": str(i)} for i in range(20)]
        >>> run = rlhf.sft(model=scratch, data=rows, trainer={"max_steps": 2})
        >>> len(run.policy.generate("Say 3", max_new_tokens=4))
        1

    Args:
        config: See `train`.
        options: See `train` and docs/training.md.
    """
    return train("sft", config, **options)


@show_options_in_signature(RewardOptions)
def train_reward(
    config: Config | Sequence[Config] | None = None, /, **options: Unpack[RewardOptions]
) -> Run:
    """Train a reward model on pairs, rankings, labels or steps (`rlhf reward`).

    Example:
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> rows = [
        ...     {"prompt": f"Say {i}", "chosen": str(i), "rejected": f"not {i}"} for i in range(20)
        ... ]
        >>> texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        >>> sft = rlhf.sft(model=scratch, data=texts, trainer={"max_steps": 2})
        >>> run = rlhf.train_reward(
        ...     model=sft, data=rows, max_length=64, trainer={"max_steps": 2}
        ... )
        >>> bool(run.metrics["eval/accuracy"].dropna().between(0, 1).all())
        True

    Args:
        config: See `train`.
        options: See `train` and docs/rewards.md. ``kind`` is the kind of reward model.
    """
    return train("reward", config, **options)


@show_options_in_signature(OfflineOptions)
def dpo(
    config: Config | Sequence[Config] | None = None, /, **options: Unpack[OfflineOptions]
) -> Run:
    """Optimize a policy on preference pairs, rows with prompt, chosen and rejected (`rlhf dpo`).

    Example:
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> rows = [
        ...     {"prompt": f"Say {i}", "chosen": str(i), "rejected": f"not {i}"} for i in range(20)
        ... ]
        >>> run = rlhf.dpo(model=scratch, data=rows, trainer={"max_steps": 2, "beta": 0.2})
        >>> run.config["trainer"]["beta"]
        0.2

    Args:
        config: See `train`.
        options: See `train` and docs/training.md.
    """
    return train("dpo", config, **options)


@show_options_in_signature(OfflineOptions)
def kto(
    config: Config | Sequence[Config] | None = None, /, **options: Unpack[OfflineOptions]
) -> Run:
    """Optimize a policy on completions with a label, true or false (`rlhf kto`).

    Example:
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> rows = [
        ...     {"prompt": f"Say {i}", "completion": str(i), "label": i % 2 == 0}
        ...     for i in range(20)
        ... ]
        >>> run = rlhf.kto(model=scratch, data=rows, trainer={"max_steps": 2})
        >>> run.finished
        True

    Args:
        config: See `train`.
        options: See `train` and docs/training.md.
    """
    return train("kto", config, **options)


class OnlineTrainingFunction(Protocol):
    """Type of the functions of the online algorithms, such as `ppo` and `grpo`."""

    __doc__: str | None

    def __call__(
        self, config: Config | Sequence[Config] | None = None, /, **options: Unpack[OnlineOptions]
    ) -> Run:
        """Train a policy; see `train` for the arguments."""
        ...


_ONLINE_DOC = """{title} ({paper}).

    {equation}

Example:
    >>> scratch = {{"scratch": {{"hidden_size": 16, "num_layers": 1, "num_heads": 2}}}}
    >>> run = rlhf.{function}(
    ...     model=scratch, env="text/Echo-v0", num_steps=1, episodes_per_step=16
    ... )
    >>> run.command
    '{name}'

Args:
    config: See `train`.
    options: See `train` and docs/algorithms.md. ``env`` or ``prompts`` is the source of episodes,
        and ``algorithm`` has the settings of the algorithm. Their defaults are: {defaults}.
"""


def _make_online_training_function(name: str, function_name: str) -> OnlineTrainingFunction:
    """Return the function of an online algorithm; its docstring describes the registry row."""

    @show_options_in_signature(OnlineOptions)
    def function(
        config: Config | Sequence[Config] | None = None, /, **options: Unpack[OnlineOptions]
    ) -> Run:
        return train(name, config, **options)

    row = ALGORITHMS[name]
    defaults = ", ".join(
        f"{key} {getattr(row.settings, key)}" for key in sorted(row.settings_with_effect)
    )
    function.__name__ = function.__qualname__ = function_name
    function.__doc__ = _ONLINE_DOC.format(
        title=row.title,
        paper=row.paper,
        equation=row.equation,
        function=function_name,
        name=name,
        defaults=defaults,
    )
    return function


ppo = _make_online_training_function("ppo", "ppo")
ppo_lagrangian = _make_online_training_function("ppo_lagrangian", "ppo_lagrangian")
grpo = _make_online_training_function("grpo", "grpo")
dr_grpo = _make_online_training_function("dr_grpo", "dr_grpo")
rloo = _make_online_training_function("rloo", "rloo")
reinforce_plus_plus = _make_online_training_function("reinforce++", "reinforce_plus_plus")
reinforce_plus_plus_baseline = _make_online_training_function(
    "reinforce++-baseline", "reinforce_plus_plus_baseline"
)
dapo = _make_online_training_function("dapo", "dapo")
gspo = _make_online_training_function("gspo", "gspo")
cispo = _make_online_training_function("cispo", "cispo")
best_of_n = _make_online_training_function("best_of_n", "best_of_n")
online_dpo = _make_online_training_function("online_dpo", "online_dpo")
