"""Build rewards from configuration: ``build({"kind": "learned", "path": ...})``.

``KINDS`` maps a kind to its builder or the builder's ``module:name``. Builders are imported on
first use, so that rules do not import torch. ``rlhf.plugins.register_reward`` adds a kind.
"""

from __future__ import annotations

import functools
import inspect
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.common.imports import import_object
from rlhf.common.names import did_you_mean
from rlhf.common.ranges import convert_to_type
from rlhf.common.registry import Registry
from rlhf.common.reward_spec import RewardSpec
from rlhf.errors import UserError
from rlhf.reward_models.adapters import as_reward
from rlhf.reward_models.core import PerConversationReward, Reward, check_unique_names
from rlhf.reward_models.worker import FunctionWorker

_BUILT_IN_KINDS: dict[str, str | Callable[..., Reward]] = {
    "code": "rlhf.reward_models.code_runner:code",
    "cost": "rlhf.reward_models.cost:CostModel.load",
    "ensemble": "rlhf.reward_models.ensemble:Ensemble.load",
    "exact_match": "rlhf.reward_models.rules:exact_match",
    "format": "rlhf.reward_models.rules:tags",
    "function": "rlhf.reward_models.registry:function_reward",
    "gate": "rlhf.reward_models.registry:gated_reward",
    "heads": "rlhf.reward_models.ensemble:HeadEnsemble.load",
    "implicit": "rlhf.reward_models.implicit:ImplicitReward.load",
    "judge": "rlhf.reward_models.judge:rating_judge",
    "learned": "rlhf.reward_models.learned:LearnedReward.load",
    "length": "rlhf.reward_models.rules:length",
    "lexicon": "rlhf.reward_models.sentiment:lexicon",
    "math": "rlhf.reward_models.rules:math",
    "number": "rlhf.reward_models.rules:number",
    "pairwise": "rlhf.reward_models.pairwise:PairModel.load",
    "process": "rlhf.reward_models.process:ProcessReward.load",
    "refusal": "rlhf.reward_models.rules:refusal",
    "regex": "rlhf.reward_models.rules:regex",
    "repetition": "rlhf.reward_models.rules:repetition",
    "trained": "rlhf.reward_models.registry:load_trained_reward",
    "vader": "rlhf.reward_models.sentiment:vader",
}

KINDS = Registry("kind of reward", _BUILT_IN_KINDS)

_DTYPES = ("float32", "bfloat16", "float16")


def plugin_reward_builder(target: Callable[..., Any], name: str) -> Callable[..., Reward]:
    """Return the builder of a kind of reward that a plug-in defines.

    Args:
        target: A function of a list of conversations, whose keyword-only parameters are the
            settings of the kind; or a class whose instances are rewards or such functions, and
            whose constructor has the settings.
        name: Name of the kind.

    Raises:
        UserError: A setting of the function is not keyword-only.
    """
    if isinstance(target, type):
        parameters = list(inspect.signature(target).parameters.values())
        hints = _type_hints_or_empty(target.__init__)
    else:
        parameters = list(inspect.signature(target).parameters.values())[1:]
        hints = _type_hints_or_empty(target)
        if any(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in parameters):
            raise UserError(
                f"reward {name!r}: write the function as score(conversations, *, setting=...): the "
                "settings follow a *"
            )

    def build_kind(**settings: Any) -> Reward:
        if isinstance(target, type):
            return as_reward(target(**settings))
        function = functools.partial(target, **settings)
        function.outcomes = getattr(target, "outcomes", None)  # type: ignore[attr-defined]
        return as_reward(function, name=name)

    build_kind.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    build_kind.__annotations__ = {p.name: hints.get(p.name, Any) for p in parameters}
    return build_kind


def _type_hints_or_empty(function: Any) -> dict[str, Any]:
    """Return the type hints of a function; {} if a name in them exists only for type checkers."""
    try:
        return typing.get_type_hints(function)
    except NameError:
        return {}


def build(spec: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Reward:
    """Build the reward of a spec; the reward of a list of specs is the sum of their rewards.

    Args:
        spec: Keys of `RewardSpec`, and the settings of the kind. ``normalize``, ``clip``,
            ``threshold`` and ``weight`` are applied in this order.

    Raises:
        UserError: A kind is unknown, a key is unknown, missing or invalid, the list is empty, or
            two components have the same name.
    """
    if isinstance(spec, Mapping):
        return _build_one(spec, "reward")
    if not spec:
        raise UserError("rewards: the list is empty; name at least one reward")
    parts = [_build_one(part, f"rewards.{index}") for index, part in enumerate(spec)]
    check_unique_names([leaf for part in parts for leaf in part.leaves()])
    return functools.reduce(operator.add, parts)


def _build_one(mapping: Mapping[str, Any], key: str) -> Reward:
    """Build the reward of one spec; ``key`` is its key in error messages. See `build`."""
    if isinstance(mapping, Mapping) and "kind" not in mapping:
        raise UserError(f"{key}.kind is required; known kinds: {', '.join(KINDS)}")
    spec: RewardSpec = convert_to_type(RewardSpec, mapping, key)
    kind = spec["kind"]
    if kind not in KINDS:
        raise UserError(f"rewards: unknown kind {kind!r}{_suggestion_text(kind, KINDS)}")
    builder = import_object(KINDS[kind], what=f"rewards: kind {kind!r}")
    settings = {key: value for key, value in spec.items() if key not in RewardSpec.__annotations__}
    _check_settings(kind, builder, settings)
    reward = builder(**settings)
    if "name" in spec:
        reward.name = spec["name"]
    if "normalize" in spec:
        stored = spec["normalize"] is True
        reward = reward.normalize(**({} if stored else spec["normalize"]))
    if "clip" in spec:
        reward = reward.clip(*spec["clip"])
    if "threshold" in spec:
        reward = reward.threshold(spec["threshold"])
    return reward * spec["weight"] if "weight" in spec else reward


def _check_settings(kind: str, builder: Callable[..., Reward], settings: Mapping[str, Any]) -> None:
    """Raise UserError if a setting is unknown, missing or has the wrong type."""
    parameters = inspect.signature(builder).parameters
    for key in settings:
        if key not in parameters:
            choices = [*parameters, *(k for k in RewardSpec.__annotations__ if k != "kind")]
            raise UserError(
                f"rewards: kind {kind!r} has no setting {key!r}{_suggestion_text(key, choices)}"
            )
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise UserError(f"rewards: kind {kind!r} needs the setting {key!r}")
    _check_setting_types(kind, builder, settings)


def _check_setting_types(
    kind: str, builder: Callable[..., Reward], settings: Mapping[str, Any]
) -> None:
    """Raise UserError if a setting has the wrong type, or ``dtype`` an unknown value."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # slow to import

    config = ConfigDict(arbitrary_types_allowed=True)  # torch.dtype
    hints = typing.get_type_hints(getattr(builder, "__func__", builder))
    for key, value in settings.items():
        try:
            TypeAdapter(hints.get(key, Any), config=config).validate_python(value)
        except ValidationError as error:
            hint = inspect.signature(builder).parameters[key].annotation
            expected = getattr(hint, "__name__", hint)
            raise UserError(
                f"rewards: kind {kind!r}: {key} must be of type {expected}, got {value!r}"
            ) from error
    if settings.get("dtype", _DTYPES[0]) not in _DTYPES:
        raise UserError(
            f"rewards: kind {kind!r}: dtype must be one of {', '.join(_DTYPES)}, "
            f"got {settings['dtype']!r}"
        )


def _suggestion_text(word: str, choices) -> str:
    """Return the end of an error message: the choice most similar to ``word``, or all choices."""
    return did_you_mean(word, choices) or f"; known: {', '.join(choices)}"


def function_reward(path: str, timeout: float | None = None) -> Reward:
    """Build a reward of kind ``function`` from a user's function from conversations to scores.

    Args:
        path: ``module:name`` of the function.
        timeout: Time limit for each conversation, in seconds, for code that may hang. The function
            then runs in a separate process, with one conversation at a time, and the process is
            killed if it exceeds the limit. By default, the function runs in this process without a
            time limit.
    """
    function = import_object(path, what="rewards: kind 'function'")
    if timeout is None:
        return as_reward(function)
    worker = FunctionWorker(path, timeout=timeout)
    plain = as_reward(function)
    return PerConversationReward(
        lambda conversation: _single_score(worker([conversation])),
        name=plain.name,
        outcomes=plain.outcomes,
        waits=True,
        code=function,
    )


def _single_score(values: Any) -> Any:
    """Return the score that a function returned for a list of one conversation.

    Raises:
        ValueError: The function did not return a list of one score.
    """
    if not isinstance(values, list) or len(values) != 1:
        size = f"{len(values)} scores" if isinstance(values, list) else type(values).__name__
        raise ValueError(f"returned {size} for 1 conversation, not a list of one score")
    return values[0]


def load_trained_reward(path: str) -> Reward:
    """Build a reward of kind ``trained``: load a checkpoint as the kind that its sidecar names.

    Without a sidecar, the kind is ``learned``. ``path`` is a folder or a Hugging Face Hub id.
    """
    from rlhf.reward_models.checkpoint import find_sidecar

    sidecar = find_sidecar(path)
    return build({"kind": sidecar.kind if sidecar else "learned", "path": path})


def gated_reward(
    reward: Mapping[str, Any],
    condition: Mapping[str, Any],
    at_least: float = 0.5,
    otherwise: float = 0.0,
) -> Reward:
    """Build a reward of kind ``gate`` from the specs of a reward and of a condition.

    The score of a conversation is the score of ``reward`` if ``condition`` scores at least
    ``at_least``, and ``otherwise`` if it scores less; see :meth:`Reward.gate`.
    """
    gate = _build_one(condition, "gate.condition")
    return _build_one(reward, "gate.reward").gate(gate, at_least=at_least, otherwise=otherwise)
