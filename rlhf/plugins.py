"""Decorators that add parts to the toolkit from outside: algorithms, rewards, commands and others.

A plug-in is a Python file or module that a configuration names (``plugins: [my_code.py]``), or an
installed package with the entry point group ``rlhf.plugins``. docs/extending.md describes all
decorators.

    from rlhf.plugins import register_reward

    @register_reward("brevity")
    def brevity(conversations, *, limit: int = 80):
        return [float(len(c[-1]["content"]) <= limit) for c in conversations]

The names in ``__all__`` are the plug-in interface, version `PLUGIN_API`. A plug-in states the
version that it was written for with ``plugin_api = 1``.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.components import advantage as register_advantage
from rlhf.algorithms.components import kl_estimator as register_kl
from rlhf.algorithms.components import policy_loss as register_policy_loss
from rlhf.algorithms.components import registered_components
from rlhf.algorithms.registry import ALGORITHMS
from rlhf.algorithms.settings import Settings
from rlhf.cli.table import COMMANDS, ONLINE_GROUP, online_command
from rlhf.commands.command import Command
from rlhf.common.names import did_you_mean
from rlhf.common.plugins import PLUGIN_API
from rlhf.common.registry import Registry
from rlhf.common.user_code import check_accepts_arguments, definition_location_text
from rlhf.config.data import Kind
from rlhf.config.engine import ENGINES
from rlhf.config.optimization import OPTIMIZERS
from rlhf.config.reward import MODEL_KINDS, RewardConfig, RewardModelKind
from rlhf.errors import UserError
from rlhf.runs.callbacks import CALLBACKS, Callback, TrainingEvent
from rlhf.runs.trackers import TRACKERS, Tracker

__all__ = [
    "PLUGIN_API",
    "Callback",
    "Settings",
    "Tracker",
    "TrainingEvent",
    "register_advantage",
    "register_algorithm",
    "register_callback",
    "register_command",
    "register_data_format",
    "register_engine",
    "register_environment",
    "register_kl",
    "register_optimizer",
    "register_policy_loss",
    "register_reward",
    "register_reward_model",
    "register_tracker",
]

T = TypeVar("T")


def register_algorithm(
    name: str,
    *,
    title: str,
    settings: Settings | None = None,
    loss: str | None = None,
    reads: tuple[str, ...] = (),
    pairs: bool = False,
    reference: bool = False,
    paper: str = "",
    equation: str = "",
    equation_source: str = "",
    summary: str = "",
    unbiased: bool = False,
    bias: str = "not stated",
    fixed_point: str = "not stated",
    constrained: bool = False,
) -> Callable[[T], T]:
    """Register an online algorithm, which becomes the command ``rlhf NAME``.

    Without ``loss``, the result is a decorator of the policy loss of the algorithm. With ``loss``,
    the algorithm uses an existing loss, and the call is a statement:

        register_algorithm("ppo_short", title="PPO with one epoch", loss="clipped",
                           settings=Settings(num_epochs=1))

    Example:
        >>> from rlhf.plugins import Settings, register_algorithm
        >>> _ = register_algorithm(
        ...     "ppo_short",
        ...     title="PPO with one epoch",
        ...     loss="clipped",
        ...     settings=Settings(num_epochs=1),
        ... )
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> run = rlhf.train("ppo_short", model=scratch, env="text/Echo-v0", num_steps=1)
        >>> run.config["algorithm"]["num_epochs"]
        1

    Args:
        name: Name of the algorithm and of its command.
        title: Full name, for the help.
        settings: Default settings.
        loss: Name of an existing policy loss. By default, the decorated function is the loss, with
            the signature ``(logprobs, batch, settings, *, denominator) -> loss, MetricSums``.
        reads: Names of the settings that have an effect with the decorated loss.
        pairs: Whether the decorated loss compares the two rows of a pair.
        reference: Whether the decorated loss reads ``batch.ref_logprobs``.
        paper: Source of the algorithm.
        equation: The loss, for the table of algorithms.
        equation_source: Source of the equation in the paper, such as "eq. 7".
        summary: Phrase for the table of algorithms.
        unbiased: See `Algorithm.unbiased`.
        bias: See `Algorithm.bias`.
        fixed_point: See `Algorithm.fixed_point`.
        constrained: See `Algorithm.constrained`.

    Raises:
        UserError: The name is taken, a component or a setting in ``reads`` does not exist, the loss
            has the wrong signature, or the settings are invalid.
    """
    summary = summary or title
    algorithm = Algorithm(
        name=name,
        title=title,
        paper=paper,
        equation=equation,
        equation_source=equation_source,
        summary=summary,
        loss=loss or name,
        settings=settings or Settings(),
        unbiased=unbiased,
        bias=bias,
        fixed_point=fixed_point,
        constrained=constrained,
    )
    if loss is not None:
        _add_algorithm(algorithm, None)  # the source is the plug-in that is being imported
        return lambda code: code
    own = register_policy_loss(name, summary, reads=reads, pairs=pairs, reference=reference)
    return lambda function: _add_algorithm(algorithm, own(function))  # type: ignore[arg-type]


def _add_algorithm(algorithm: Algorithm, code: T) -> T:
    """Check an algorithm, and register it and its command.

    Args:
        algorithm: The algorithm.
        code: The decorated loss, or None for an existing loss.

    Returns:
        ``code``.
    """
    registered_components("losses").require(algorithm.loss)
    registered_components("advantages").require(algorithm.settings.advantage)
    algorithm.check()
    ALGORITHMS.add(algorithm.name, algorithm, code)
    COMMANDS.add(online_command(algorithm.name, algorithm.title), ONLINE_GROUP, code)
    return code


def register_reward(name: str) -> Callable[[T], T]:
    """Register a kind of reward, for ``rewards: [{kind: NAME, ...}]``.

    The decorator applies to a function of a list of conversations that returns a list with a number
    or None for each of them. Its keyword-only parameters are settings of the kind. The decorator
    also applies to a class whose instances are such functions, and to a subclass of
    `rlhf.reward_models.Reward`; the parameters of the constructor are the settings.

    Example:
        >>> from rlhf.plugins import register_reward
        >>> from rlhf.reward_models import build
        >>> @register_reward("brevity")
        ... def brevity(conversations, *, limit: int = 80):
        ...     return [float(len(c[-1]["content"]) <= limit) for c in conversations]
        >>> reward = build({"kind": "brevity", "limit": 10})
        >>> reward([[{"role": "assistant", "content": "short"}]])
        [1.0]

    Args:
        name: Name of the kind.

    Raises:
        UserError: The name is taken, or a setting of the function is not keyword-only.
    """

    def decorate(target: T) -> T:
        from rlhf.reward_models.registry import KINDS, plugin_reward_builder

        KINDS.add(name, plugin_reward_builder(target, name), target)  # type: ignore[arg-type]
        return target

    return decorate


def register_reward_model(name: str, *, settings: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Register a kind of reward model, for ``rlhf reward --kind NAME``.

    The decorator applies to a subclass of `rlhf.training.reward_models.base.RewardKind`.

    Example:
        >>> import torch
        >>> from rlhf.plugins import register_reward_model
        >>> from rlhf.training.reward_models.preference import PairKind
        >>> @register_reward_model("hinge", settings=("num_heads",))
        ... class HingeKind(PairKind):
        ...     def pair_losses(self, chosen, rejected, margin):
        ...         return torch.relu(1 - (chosen - rejected))
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> rows = [{"prompt": f"{i}?", "chosen": f"{i}", "rejected": "no"} for i in range(20)]
        >>> texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        >>> sft = rlhf.sft(model=scratch, data=texts, trainer={"max_steps": 1})
        >>> options = {"kind": "hinge", "max_length": 64, "trainer": {"max_steps": 1}}
        >>> run = rlhf.train_reward(model=sft, data=rows, **options)
        >>> run.config["kind"]
        'hinge'

    Args:
        name: Name of the kind.
        settings: Keys of `RewardConfig` that have an effect on this kind but not on all kinds, such
            as ``("labels",)``.

    Raises:
        UserError: A key in ``settings`` does not exist, the name is taken, or the class is not
            derived from `RewardKind` or lacks one of its methods.
    """
    known = {field.name for field in dataclasses.fields(RewardConfig)}
    for key in settings:
        if key not in known:
            hint = did_you_mean(key, known)
            raise UserError(f"reward model {name!r}: settings: there is no key {key!r}{hint}")

    def decorate(target: T) -> T:
        from rlhf.training.reward_models.base import RewardKind

        kind: Any = target
        if not isinstance(kind, type) or not issubclass(kind, RewardKind):
            raise UserError(
                f"reward model {name!r}{definition_location_text(target)}: derive the class from "
                "rlhf.training.reward_models.base.RewardKind"
            )
        for method in ("encode", "loss", "metrics"):
            if getattr(kind, method) is getattr(RewardKind, method):
                raise UserError(
                    f"reward model {name!r}{definition_location_text(target)}: {kind.__name__} "
                    f"does not define {method}; derive it from a kind that does, such as "
                    "rlhf.training.reward_models.preference.PairKind"
                )
        MODEL_KINDS.add(name, RewardModelKind(target, settings), target)  # type: ignore[arg-type]
        return target

    return decorate


def register_environment(env_id: str, **options: Any) -> Callable[[T], T]:
    """Register a gymnasium environment, for ``env: {id: ENV_ID}`` and `rlhf envs`.

    The decorator applies to a class or to a function that returns an environment.

    Example:
        >>> import gymnasium
        >>> from rlhf.envs.core import FreeText
        >>> from rlhf.plugins import register_environment
        >>> @register_environment("mine/Yes-v0")
        ... class Yes(gymnasium.Env):
        ...     def __init__(self):
        ...         self.observation_space, self.action_space = FreeText(), FreeText()
        ...
        ...     def reset(self, *, seed=None, options=None):
        ...         super().reset(seed=seed)
        ...         return "Say yes.", {}
        ...
        ...     def step(self, action):
        ...         return "", float(action == "yes"), True, False, {}
        >>> gymnasium.make("mine/Yes-v0").reset()[0]
        'Say yes.'

    Args:
        env_id: Gymnasium id, such as "mine/HotOrCold-v0".
        options: Further arguments of `gymnasium.register`, such as ``reward_threshold``.
    """

    def decorate(creator: T) -> T:
        from rlhf.envs.registration import register_environment as register

        register(env_id, creator, **options)  # type: ignore[arg-type]
        return creator

    return decorate


def register_command(
    name: str,
    summary: str,
    *,
    arguments: tuple[str, ...] = (),
    group: str = "Plug-ins",
    makes_run: bool = False,
) -> Callable[[T], T]:
    """Register a command of the command line, ``rlhf NAME``.

    The decorator applies to a generator function of a configuration that yields the lines to print
    and may return the exit code. The annotation of its argument is the configuration class, a
    frozen dataclass whose fields are the options.

    Example:
        >>> from dataclasses import dataclass
        >>> from rlhf.plugins import register_command
        >>> @dataclass(frozen=True)
        ... class HelloConfig:
        ...     name: str
        >>> @register_command("hello", "greet someone", arguments=("name",))
        ... def hello(config: HelloConfig):
        ...     yield f"Hello {config.name}"
        >>> from rlhf.cli.main import main
        >>> main(["hello", "world"])
        Hello world
        0

    Args:
        name: One or two words.
        summary: One-line description for the help.
        arguments: Fields that positional arguments set, in order.
        group: Heading in `rlhf --help`.
        makes_run: Whether the command writes a run directory. The function then has the arguments
            ``(name, config, run)``, its configuration is derived from
            `rlhf.config.base.RunConfig`, and it returns the path of its result.

    Raises:
        UserError: The name is taken, the signature is wrong, the configuration is not annotated
            with a dataclass, or the dataclass has no field of a name in ``arguments``.
    """

    def decorate(function: T) -> T:
        what = f"command {name!r}"
        config = _config_class_of_command(function, what=what, makes_run=makes_run)
        known = [field.name for field in dataclasses.fields(config)]
        for key in arguments:
            if key not in known:
                raise UserError(
                    f"{what}: arguments: {config.__name__} has no field {key!r}"
                    f"{did_you_mean(key, known)}"
                )
        command = Command(
            name,
            summary,
            config,
            function,  # type: ignore[arg-type]
            arguments=arguments,
            makes_run=makes_run,
        )
        COMMANDS.add(command, group, function)
        return function

    return decorate


def _config_class_of_command(function: Any, *, what: str, makes_run: bool) -> type[Any]:
    """Return the dataclass with which a command annotates its configuration.

    Raises:
        UserError: The signature is not that of a command, or the annotation is not a dataclass.
    """
    check_accepts_arguments(
        function,
        (None, None, None) if makes_run else (None,),
        what=what,
        required_signature="command(name, config, run)" if makes_run else "command(config)",
    )
    hints = typing.get_type_hints(function)
    parameters = list(inspect.signature(function).parameters)
    config = hints.get(parameters[1 if makes_run else 0])
    if not isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise UserError(
            f"{what}: annotate the configuration of {function.__name__} with its dataclass"
        )
    return config


def _add_to(
    registry: Registry[Any], name: str, arguments: tuple[str, ...] = ()
) -> Callable[[T], T]:
    """Return a decorator that adds a function or class to a registry.

    Args:
        registry: The registry.
        name: Name of the entry.
        arguments: Arguments that the function must accept; if empty, the signature is not checked.

    Raises:
        UserError: The name is taken, or the function does not accept the arguments.
    """

    def decorate(part: T) -> T:
        if arguments:
            required = f"{getattr(part, '__name__', 'function')}({', '.join(arguments)})"
            what = f"{registry.what} {name!r}"
            check_accepts_arguments(part, arguments, what=what, required_signature=required)  # type: ignore[arg-type]
        registry.add(name, part, part)
        return part

    return decorate


def register_optimizer(name: str) -> Callable[[T], T]:
    """Register an optimizer, for ``optimizer.name`` and ``trainer.optim``.

    The decorator applies to a function of the parameters and
    `rlhf.training.optimizers.OptimizerSettings` that returns a `torch.optim.Optimizer`.

    Example:
        >>> import torch
        >>> from rlhf.plugins import register_optimizer
        >>> @register_optimizer("momentum")
        ... def momentum(parameters, settings):
        ...     return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=0.9)
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> run = rlhf.rloo(
        ...     model=scratch, env="text/Echo-v0", num_steps=1, optimizer={"name": "momentum"}
        ... )
        >>> run.config["optimizer"]["name"]
        'momentum'

    Args:
        name: Name of the optimizer.
    """
    return _add_to(OPTIMIZERS, name, ("parameters", "settings"))


def register_engine(name: str) -> Callable[[T], T]:
    """Register a rollout engine, for ``rollout.engine.kind``.

    The decorator applies to a class that is derived from `rlhf.rollout.sampling.base.EngineBase`,
    or to a function that returns an engine. Its arguments are the model, the configuration of the
    run, and the keys of ``rollout.engine.options``.

    Example:
        >>> from rlhf.plugins import register_engine
        >>> from rlhf.rollout.sampling.base import EngineBase
        >>> @register_engine("mine")
        ... class MyEngine(EngineBase):
        ...     def __init__(self, model, config, *, url):
        ...         self.url = url
        >>> from rlhf.config.engine import ENGINES
        >>> ENGINES["mine"] is MyEngine
        True

    Args:
        name: Name of the engine.
    """
    return _add_to(ENGINES, name)


def register_tracker(name: str) -> Callable[[T], T]:
    """Register an experiment tracker, for ``track: [NAME]``.

    The decorator applies to a function of the run directory, the configuration with dotted keys,
    and the first step, that returns a `Tracker`.

    Example:
        >>> from rlhf.plugins import Tracker, register_tracker
        >>> seen = []
        >>> @register_tracker("list")
        ... def open_list(directory, config, step):
        ...     return Tracker(lambda step, metrics: seen.append(step), lambda: None)
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> run = rlhf.rloo(model=scratch, env="text/Echo-v0", num_steps=1, track=["list"])
        >>> seen
        [1]

    Args:
        name: Name of the tracker.
    """
    return _add_to(TRACKERS, name, ("directory", "config", "step"))


def register_callback(name: str) -> Callable[[T], T]:
    """Register a callback, for ``callbacks: [NAME]``.

    The decorator applies to a subclass of `Callback`, or to a function of a `TrainingEvent`, which
    is called after every step.

    Example:
        >>> from rlhf.plugins import register_callback
        >>> @register_callback("halve")
        ... def stop_in_the_middle(event):
        ...     if event.step * 2 >= event.num_steps:
        ...         event.stop()
        >>> scratch = {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> run = rlhf.rloo(model=scratch, env="text/Echo-v0", num_steps=2, callbacks=["halve"])
        >>> len(run.metrics)
        1

    Args:
        name: Name of the callback.
    """
    return _add_to(CALLBACKS, name)


def register_data_format(
    name: str,
    *,
    columns: Sequence[str],
    kinds: Sequence[Kind],
    optional_columns: Sequence[str] = (),
) -> Callable[[T], T]:
    """Register a format of datasets, which is recognized by its columns.

    The decorator applies to a function of a row (column -> value) and the kind of the rows. It
    yields the cells of any number of canonical rows, such as ``{"prompt": ..., "chosen": ...,
    "rejected": ...}`` for the kind preference, or raises `rlhf.data.messages.RowDropped`.

    Example:
        >>> from rlhf.data import DataSpec, load, write_jsonl
        >>> from rlhf.plugins import register_data_format
        >>> @register_data_format("exam", columns=("task", "gold", "wrong"), kinds=("preference",))
        ... def read_exam(row, kind):
        ...     for wrong in row["wrong"]:
        ...         yield {"prompt": row["task"], "chosen": row["gold"], "rejected": wrong}
        >>> rows = [{"task": "1 + 1?", "gold": "2", "wrong": ["3", "4"]}]
        >>> _ = write_jsonl("exam.jsonl", rows)
        >>> len(load(DataSpec("exam.jsonl"), "preference", seed=0).rows)
        2

    Args:
        name: Name of the format, for log lines.
        columns: Columns that a dataset of this format has.
        kinds: Kinds of rows that the function can yield; docs/data.md describes them.
        optional_columns: Further columns that the function reads.

    Raises:
        UserError: A kind does not exist, the name is taken, or the signature is wrong.
    """
    for kind in kinds:
        if kind not in (known := typing.get_args(Kind)):
            hint = did_you_mean(kind, known)
            raise UserError(f"data format {name!r}: kinds: there is no kind {kind!r}{hint}")

    def decorate(read: T) -> T:
        from rlhf.data.schemas import SCHEMAS, Schema

        check_accepts_arguments(
            read,  # type: ignore[arg-type]
            ({}, kinds[0]),
            what=f"data format {name!r}",
            required_signature="read(row, kind)",
        )
        schema = Schema(
            name,
            frozenset(columns),
            tuple(kinds),
            read,  # type: ignore[arg-type]
            uses=tuple(optional_columns),
        )
        SCHEMAS.add(name, schema, read)
        return read

    return decorate
