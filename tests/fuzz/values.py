"""Hostile values, and mutations of plain data by a seeded random generator."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 3, 7, 0.0, -0.0, 0.5, 1.0, -0.5, 1e-300, 1e20, -1e20, 2**31, 2**63, 2**64, 10**40,
    math.nan, math.inf, -math.inf,
)  # fmt: skip
TEXTS = (
    "", " ", "\n", "a", "null", "true", "1e-05", "-1", "nan", "random", "expert", "..", "../x",
    "/", "a/b", "~", "\u2028", "a\u0085b", "😀", "e\u0301", "\x00", "\x1b[31m", "\ud800", "\u202e",
    "{text}", "{0.__class__}", "%s", "<b>&amp;</b>", "=1+1", "stage:x", "stage:", "module:name",
    "os:system", ":", "a" * 5000, "٣", "2024-01-01", "Human: a\n\nAssistant: b", "\n\nHuman:",
    "\n\nHuman: a\n\nAssistant:", "[", "{", "[{}]", '{"a": 1}', "\\boxed{", "</think>", "(" * 200,
    "rlhf.data.load:load", "preference", "gae", "k1", "cosine", "float16", "text/Echo-v0", "yes",
)  # fmt: skip
CONTAINERS = ([], {}, [None], [[]], [{}], {"": 1}, {"a": {"b": []}}, [1, "a"], {"x": None})
VALUES = (*NUMBERS, *TEXTS, *CONTAINERS, None, True, False)

Path = tuple[Any, ...]


def paths_of(tree: Any, path: Path = ()) -> list[Path]:
    """Return the paths of all values in a tree, without the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    paths: list[Path] = []
    for key, value in items:
        paths.append((*path, key))
        if isinstance(value, dict | list):
            paths += paths_of(value, (*path, key))
    return paths


def value_at(tree: Any, path: Path) -> Any:
    """Return the value at a path."""
    for key in path:
        tree = tree[key]
    return tree


def hostile(generator: random.Random) -> Any:
    """Return a copy of one of `VALUES`."""
    return copy.deepcopy(generator.choice(VALUES))


def mutate(tree: Any, generator: random.Random) -> None:
    """Change, remove, copy or wrap one value of a tree in place."""
    paths = paths_of(tree)
    if not paths:
        return
    path = generator.choice(paths)
    parent, key = value_at(tree, path[:-1]), path[-1]
    kind = generator.randrange(8)
    if kind <= 2:
        parent[key] = hostile(generator)
    elif kind == 3:
        del parent[key]
    elif kind == 4:
        parent[key] = copy.deepcopy(value_at(tree, generator.choice(paths)))
    elif kind == 5:
        parent[key] = [copy.deepcopy(parent[key])] * generator.randrange(1, 4)
    elif kind == 6 and isinstance(parent, dict):
        parent[generator.choice([None, 1, 0.5, True, "", "a.b", *TEXTS[:20]])] = hostile(generator)
    elif isinstance(parent[key], str):
        text = parent[key]
        place = generator.randrange(len(text) + 1)
        parent[key] = text[:place] + generator.choice(TEXTS) + text[place:]
    else:
        parent[key] = {"a": parent[key]}
