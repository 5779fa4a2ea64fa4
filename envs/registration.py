"""Environments that are defined outside the toolkit: registration, and ids that name code."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym

from rlhf.common.objects import is_object_reference, object_of
from rlhf.common.plugins import load_module, split_reference
from rlhf.common.registry import Registry
from rlhf.errors import UserError

Creator = Callable[..., gym.Env]
"""An environment class, or a function that returns an environment."""

ENVIRONMENTS: Registry[Creator] = Registry("environment")
"""Gymnasium id -> creator of the environments that plug-ins register."""


def register_environment(env_id: str, creator: Creator, **options: Any) -> None:
    """Register an environment in gymnasium, and list it with the environments of the toolkit.

    Args:
        env_id: Gymnasium id, such as "mine/HotOrCold-v0".
        creator: The environment class, or a function that returns an environment.
        options: Further arguments of `gymnasium.register`, such as ``reward_threshold``.

    Raises:
        UserError: The id exists already, and was not registered by the same file or module.
    """
    if env_id not in ENVIRONMENTS and (spec := gym.registry.get(env_id)):
        raise UserError(
            f"environment {env_id!r} exists already ({spec.entry_point}): choose another name"
        )
    ENVIRONMENTS.add(env_id, creator, creator)
    _register(env_id, creator, **options)


def import_environment_id(env_id: str) -> str:
    """Return the gymnasium id of the environment that ``env.id`` in a configuration names.

    A class or function that was not registered is registered under a new id.

    Args:
        env_id: A gymnasium id, ``module:name``, ``file.py:name``, or an ``object:`` name from
            `rlhf.common.objects`. The module or file is imported. The name is an id that the module
            or file registers, an environment class, or a function that returns an environment.

    Raises:
        UserError: The module or file cannot be imported, or this process does not have the object.
    """
    module_name, name = split_reference(env_id)
    if not name:
        return env_id
    if is_object_reference(env_id):
        creator, namespace = object_of(env_id, what="env.id"), "object"
    else:
        module = load_module(module_name, what="env.id")
        creator, namespace = getattr(module, name, None), module.__name__
        if name in gym.registry or not callable(creator):
            return name
    known_id = re.sub(r"[^\w/-]", "-", f"{namespace}/{name}")
    spec = gym.registry.get(known_id)
    if spec is None or spec.entry_point is not creator:
        _register(known_id, creator)
    return known_id


def _register(env_id: str, creator: Creator, **options: Any) -> None:
    with warnings.catch_warnings():  # a plug-in that is loaded again replaces its environment
        warnings.filterwarnings("ignore", message=".*Overriding environment.*")
        gym.register(id=env_id, entry_point=creator, **options)
