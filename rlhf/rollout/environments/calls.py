"""Call environments: check the results, limit the time of a call, and handle failures."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np

from rlhf.common.files import is_utf8_encodable
from rlhf.common.foreign import (
    ensure_ordinary_exceptions,
    limit_side_effects,
    location_text,
    user_code_location,
)
from rlhf.common.plugins import short_name
from rlhf.common.text import mask_secrets
from rlhf.common.user_code import (
    add_location_to_errors,
    copy_of_argument,
    warn_if_argument_changed,
)
from rlhf.config.rollout import EnvSpec
from rlhf.errors import UserError, first_line
from rlhf.rollout.environments.process import ProcessEnvironment

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass
class EnvironmentCaller:
    """Calls the code of environments. A failure raises an error or is counted.

    Args:
        errors: Effect of a failure: "raise" or "count".
        timeout: Time limit of one call in seconds. By default, there is no limit.
        can_drop: Whether the user can choose "count", for the message.
    """

    errors: str = "raise"
    timeout: float | None = None
    can_drop: bool = True
    failures: Counter[str] = field(default_factory=Counter)
    """Reason -> number of episodes that were dropped for this reason."""

    @classmethod
    def from_spec(cls, spec: EnvSpec) -> EnvironmentCaller:
        """Return an instance with the ``errors`` and ``timeout`` of a configuration."""
        return cls(spec.errors, spec.timeout)

    def run(self, seed: int, call: Callable[[], Result]) -> Result | None:
        """Run ``call`` and return its result, or None if it failed and ``errors`` is "count".

        Args:
            seed: Seed of the episode, for messages.
            call: Function that calls the environment.

        Raises:
            UserError: The call raised a UserError, or it failed and ``errors`` is "raise".
        """
        try:
            with limit_side_effects(self.timeout):
                return call()
        except Exception as error:
            self.record_failure(seed, error)
            return None

    def record_failure(self, seed: int, error: Exception) -> None:
        """Count the failure of an episode's environment, and log a warning.

        Raises:
            UserError: The error is a UserError, or ``errors`` is "raise".
        """
        if isinstance(error, UserError):
            raise error
        location = location_text(user_code_location(error))
        reason = mask_secrets(f"{type(error).__name__}: {first_line(error)}{location}")
        if self.errors == "raise":
            drop = ", or drop such episodes with env.errors: count" if self.can_drop else ""
            raise UserError(
                f"the environment failed in the episode of seed {seed}: {reason}; correct the "
                f"environment{drop}"
            ) from error
        self.failures[f"environment: {reason}"] += 1
        log.warning("episode of seed %d dropped: %s", seed, reason)

    def close(self, env: gym.Env) -> None:
        """Close an environment. A failure is only logged as a warning."""
        try:
            with limit_side_effects(self.timeout):
                env.close()
        except Exception as error:
            self.warn_not_closed(error)

    def warn_not_closed(self, error: Exception) -> None:
        """Log that an environment could not be closed."""
        log.warning("an environment could not be closed: %s", first_line(error))


def make_env_factory(
    spec: EnvSpec, prompts: Sequence[Any] = (), *, split: str | None = None
) -> Callable[[], gym.Env]:
    """Return a picklable function that makes one environment.

    The function raises UserError if the id is unknown, or if the environment cannot be made with
    the arguments.

    Args:
        spec: Environment id and arguments, or prompt datasets.
        prompts: Conversations, if the spec names prompt datasets.
        split: "train" or "test", for environments with separate training and test data. By default,
            the arguments of the spec determine the split.
    """
    return functools.partial(_make_environment, spec, prompts, split)


def _make_environment(spec: EnvSpec, prompts: Sequence[Any], split: str | None) -> gym.Env:
    """Make an environment; `make_env_factory` describes the arguments and the errors."""
    from rlhf import envs
    from rlhf.envs.items import kwargs_for_split
    from rlhf.envs.prompts import PromptEnv
    from rlhf.envs.registration import import_environment_id

    assert envs.TASKS  # importing the package registers the environments
    if spec.id is None:
        return PromptEnv(prompts)
    try:
        env_id = import_environment_id(spec.id)
        creator = getattr(gym.registry.get(env_id), "entry_point", None)
        kwargs = kwargs_for_split(env_id, spec.kwargs, split) if split else spec.kwargs
        given = copy_of_argument(dict(kwargs))
        in_main_thread = threading.current_thread() is threading.main_thread()
        # In a thread, the workers of the environment limit the time and the other effects.
        guard = limit_side_effects(spec.timeout) if in_main_thread else ensure_ordinary_exceptions()
        with add_location_to_errors(creator), guard:
            env = gym.make(env_id, disable_env_checker=True, **given)
        what = f"the constructor of {short_name(spec.id)}"
        warn_if_argument_changed(
            dict(kwargs), given, what=what, code=creator, argument="env.kwargs"
        )
        return env
    except gym.error.Error as error:
        raise UserError(f"env.id {spec.id!r}: {first_line(error)}") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"env.id {spec.id!r} cannot be made: {first_line(error)}"
            f"{location_text(user_code_location(error))}; correct its constructor or env.kwargs"
        ) from error


@contextlib.contextmanager
def temporary_environment(
    make_env: Callable[[], gym.Env], *, timeout: float | None
) -> Iterator[gym.Env]:
    """Return a context manager that makes an environment, and closes it within ``timeout`` seconds.

    A failure of the closing is only logged as a warning.
    """
    env = make_env()
    try:
        yield env
    finally:
        EnvironmentCaller(timeout=timeout).close(env)


def turn_limit(env: gym.Env) -> int | None:
    """Return the maximum number of turns of an episode, or None if there is no limit.

    It is the smaller of the environment's ``max_turns`` and the registered ``max_episode_steps``.
    """
    registered = getattr(env.spec, "max_episode_steps", None)
    limits = [n for n in (getattr(env.unwrapped, "max_turns", None), registered) if n]
    return min(limits, default=None)


def reset_environment(env: gym.Env, seed: int) -> tuple[str, dict[str, Any]]:
    """Reset an environment. Return the observation as text, and the info.

    Raises:
        TypeError: A returned value has the wrong type, or a message has no role or content.
        ValueError: The number of values is wrong, or a text contains half of a surrogate pair.
    """
    with _errors_located_at(env, "reset"):
        result = _unpacked(env.reset(seed=seed), "reset", ("observation", "info"))
        return _checked_reset_result(*result)


def _checked_reset_result(observation: Any, info: Any) -> tuple[str, dict[str, Any]]:
    """Return the checked result of `reset`; see `reset_environment`."""
    info = dict(_require_type(info, Mapping, "info"))
    for message in info.get("messages", ()):
        if not {"role", "content"} <= set(
            _require_type(message, Mapping, 'an entry of info["messages"]')
        ):
            raise TypeError('an entry of info["messages"] has no key "role" or no key "content"')
        for key in ("role", "content"):
            text = _require_type(message[key], str, f'the {key} of info["messages"]')
            _require_encodable(text, f'the {key} of info["messages"]')
    return _observation_text(observation), info


def step_environment(env: gym.Env, action: Any) -> tuple[str, float, bool, bool, Mapping[str, Any]]:
    """Step an environment.

    Returns:
        The observation as text, the reward, whether the episode is terminated, whether it is
        truncated, and the info.

    Raises:
        TypeError: A returned value has the wrong type.
        ValueError: The number of values is wrong, the observation contains half of a surrogate
            pair, the reward or the cost is not finite, or `is_success` or `valid` of the info is a
            number other than 0 and 1.
    """
    names = ("observation", "reward", "terminated", "truncated", "info")
    with _errors_located_at(env, "step"):
        return _checked_step_result(*_unpacked(env.step(action), "step", names))


def _checked_step_result(
    observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any
) -> tuple[str, float, bool, bool, Mapping[str, Any]]:
    """Return the checked result of `step`; see `step_environment`."""
    info = _require_type(info, Mapping, "info")
    if "cost" in info:
        _require_finite_number(info["cost"], 'info["cost"]')
    if info.get("is_success") is not None:
        _require_zero_or_one(info["is_success"], 'info["is_success"]')
    if "valid" in info:
        _require_zero_or_one(info["valid"], 'info["valid"]')
    for name, value in (("terminated", terminated), ("truncated", truncated)):
        _require_type(value, bool | int | np.bool_, name)
    reward = _require_finite_number(reward, "the reward")
    return _observation_text(observation), reward, bool(terminated), bool(truncated), info


def _errors_located_at(env: gym.Env, method: str) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that gives the location of a method to errors without a location."""
    task = env.unwrapped
    location = task.definitions.get(method) if isinstance(task, ProcessEnvironment) else None
    return add_location_to_errors(getattr(type(task), method, None), type(task), location=location)


def _unpacked(result: Any, method: str, names: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the values that a method of an environment returned.

    Raises:
        TypeError: The method did not return several values.
        ValueError: The number of values is wrong.
    """
    form = f"return {', '.join(names)}"
    if not isinstance(result, tuple | list):
        raise TypeError(f"{method} returned a value of type {type(result).__name__}; {form}")
    if len(result) != len(names):
        raise ValueError(f"{method} returned {len(result)} values; {form}")
    return tuple(result)


def _require_type(value: Any, expected: Any, name: str) -> Any:
    """Return ``value``; raise TypeError if it does not have the expected type."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} is of type {type(value).__name__}")
    return value


def _observation_text(observation: Any) -> str:
    if observation is None or isinstance(observation, bytes):
        raise TypeError(f"the observation is of type {type(observation).__name__}")
    return _require_encodable(str(observation))


def _require_encodable(text: str, name: str = "the observation") -> str:
    """Return the text. Raise ValueError for a lone surrogate, which tokenizers reject."""
    if not is_utf8_encodable(text):
        raise ValueError(f"{name} contains half of a surrogate pair")
    return text


def _require_zero_or_one(value: Any, name: str) -> None:
    """Raise an error unless a value is 0 or 1. Other numbers, such as a score, would count as 1."""
    if (number := _require_finite_number(value, name)) not in (0, 1):
        raise ValueError(f"{name} is {number}, not true or false")


def _require_finite_number(value: Any, name: str) -> float:
    """Return a value as a float; raise TypeError if it is no number, ValueError if not finite."""
    wrong_type = f"{name} is of type {type(value).__name__}"
    if isinstance(value, str):
        raise TypeError(wrong_type)
    try:
        number = float(value)
    except (TypeError, ValueError):
        shape = f" and shape {value.shape}" if hasattr(value, "shape") else ""
        raise TypeError(f"{wrong_type}{shape}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}")
    return number
