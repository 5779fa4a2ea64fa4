"""Items of training and of evaluation: kept apart by content where a task has separate items.

An item is what an episode is about: a question, a map, a hidden program. Seeds of training and
evaluation never meet, but a task with few items deals the same ones to both.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

from rlhf.errors import UserError

ItemT = TypeVar("ItemT")
SPLITS = ("all", "train", "test")
TEST_SHARE = 0.2
"""Of the items of a task whose items can be listed."""


def split_items(
    items: Sequence[ItemT], split: str, content: Callable[[ItemT], Any] = lambda item: item
) -> list[ItemT]:
    """The items of a split, in their order; items of equal content are never apart.

    Contents are ranked by a hash, the first fifth of which is the test split, so that a split does
    not depend on the order of the items.

    Args:
        items: All of them.
        split: "all", "train" or "test".
        content: What an item shows; its `repr` is compared.

    Raises:
        UserError: all items have one content, so that nothing could be held out.
    """
    if split == "all":
        return list(items)
    keys = [repr(content(item)) for item in items]
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).digest())
    if len(ranked) < 2:
        raise UserError(f"split {split!r} needs two different items or more, here is one")
    held = set(ranked[: max(1, round(TEST_SHARE * len(ranked)))])
    return [i for i, key in zip(items, keys, strict=True) if (key in held) == (split == "test")]


def half_of(text: str) -> str:
    """ "train" or "test", by a hash of the text without regard to case and white space."""
    digest = hashlib.sha256(" ".join(text.casefold().split()).encode())
    return "train" if digest.digest()[0] % 2 else "test"


def is_separable(env_id: str) -> bool:
    """Whether the environment takes `split` and keeps the items of its splits apart.

    Its class says so by the attribute `separable`; the environment is not made.
    """
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        entry = gym.spec(name).entry_point
        maker = load_env_creator(entry) if isinstance(entry, str) else entry
    except (gym.error.Error, ImportError, AttributeError):
        return False  # making it will say what is wrong
    return bool(getattr(maker, "separable", False))


def split_kwargs(env_id: str, kwargs: dict[str, Any], split: str) -> dict[str, Any]:
    """Keyword arguments under which an environment deals the items of a split.

    What the user set stays, except that evaluation of a run that trains on "train" takes "test".
    """
    given = kwargs.get("split")
    if not is_separable(env_id) or (given is not None and (given, split) != ("train", "test")):
        return dict(kwargs)
    return {**kwargs, "split": split}
