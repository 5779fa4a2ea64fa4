"""Disjoint items for training and evaluation.

An item is the content of an episode, such as a question, a map or a hidden program. Training and
evaluation use different seeds, but in a task with few items, different seeds draw the same items.
Tasks with the argument `split` therefore divide the items themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import gymnasium as gym
from gymnasium.envs.registration import (
    EnvSpec,
    find_highest_version,
    get_env_id,
    load_env_creator,
    parse_env_id,
)

from rlhf.envs.registration import import_environment_id
from rlhf.errors import UserError

ItemT = TypeVar("ItemT")
SPLITS = ("all", "train", "test")
SAME_SPLIT_WARNING = (
    "Training and evaluation draw from the same items, because env.kwargs sets split: {}."
)
"""Description of the items of a run whose `env.kwargs` set `split` to a value other than
"train"."""
TEST_SHARE = 0.2
"""Fraction of the distinct items that are in the test split."""


def split_items(
    items: Sequence[ItemT], split: str, content_of: Callable[[ItemT], Any] = lambda item: item
) -> list[ItemT]:
    """Return the items of a split in their original order.

    Items with equal content are in the same split. The distinct contents are ranked by a hash, and
    the first fifth of the ranking (rounded, and at least one content) is the test split. A split
    therefore does not depend on the order of the items.

    Args:
        items: All items.
        split: "all", "train" or "test".
        content_of: Function that returns the part of an item that the agent sees. Contents with
            equal `repr` are equal.

    Raises:
        UserError: `split` is "train" or "test", and there are fewer than two different items.
    """
    if split == "all":
        return list(items)
    keys = [repr(content_of(item)) for item in items]
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).digest())
    if len(ranked) < 2:
        raise UserError(
            f"split {split!r} needs at least two different items, but there are {len(ranked)}"
        )
    test_keys = set(ranked[: max(1, round(TEST_SHARE * len(ranked)))])
    is_test = split == "test"
    return [i for i, key in zip(items, keys, strict=True) if (key in test_keys) == is_test]


def split_of_text(text: str) -> str:
    """Return "train" or "test", by the hash of a text. Each split has about half of all texts.

    The hash ignores case and the amount of white space.
    """
    digest = hashlib.sha256(" ".join(text.casefold().split()).encode())
    return "train" if digest.digest()[0] % 2 else "test"


def has_separate_splits(env_id: str) -> bool:
    """Return whether an environment has an argument `split` that gives disjoint items.

    The result is the class attribute `separable`, so no environment is created. It is False if the
    environment cannot be imported.
    """
    try:
        entry = _find_spec(import_environment_id(env_id)).entry_point
        creator = load_env_creator(entry) if isinstance(entry, str) else entry
    except (gym.error.Error, ImportError, AttributeError, UserError):
        return False  # creating the environment will raise the error
    return bool(getattr(creator, "separable", False))


def _find_spec(name: str) -> EnvSpec:
    """Return the spec of an environment id.

    If the id has no version, the highest version is used, as in `gym.make`.

    Raises:
        gym.error.Error: The id is not registered.
    """
    namespace, short_name, version = parse_env_id(name)
    if version is None:
        version = find_highest_version(namespace, short_name)
    return gym.spec(get_env_id(namespace, short_name, version))


def kwargs_for_split(env_id: str, kwargs: dict[str, Any], split: str) -> dict[str, Any]:
    """Return the keyword arguments with which an environment draws the items of `split`.

    Args:
        env_id: Id of the environment. If the environment is not separable, a copy of `kwargs` is
            returned.
        kwargs: Keyword arguments of the user. If they contain a `split`, it takes precedence over
            the argument `split`. The only exception is that "train" is replaced with "test" if the
            argument `split` is "test".
        split: "train" or "test".
    """
    user_split = kwargs.get("split")
    is_override = user_split is not None and (user_split, split) != ("train", "test")
    if is_override or not has_separate_splits(env_id):
        return dict(kwargs)
    return {**kwargs, "split": split}


def draws_only_items_of_split(env_id: str, kwargs: dict[str, Any], split: str) -> bool:
    """Return whether an environment with `kwargs_for_split(...)` draws items of `split` only."""
    return (
        has_separate_splits(env_id)
        and kwargs_for_split(env_id, kwargs, split).get("split") == split
    )
