"""Checks of the types of values; most of them narrow the type for a type checker."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard


def is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    """Return whether a value is a mapping."""
    return isinstance(value, Mapping)


def is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether a value is a sequence, and not a text or bytes."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_path(value: Any) -> TypeGuard[str | os.PathLike[str]]:
    """Return whether a value is a path as a text or as an object."""
    return isinstance(value, str | os.PathLike)


def is_set(value: Any) -> TypeGuard[set[Any]]:
    """Return whether a value is a set."""
    return isinstance(value, set)


def is_instance_of_dataclass(value: Any) -> bool:
    """Return whether a value is an instance of a dataclass, and not the class itself."""
    return dataclasses.is_dataclass(value) and not inspect.isclass(value)


def as_list(value: Any) -> list[Any]:
    """Return the items of a sequence, or any other value as the only item."""
    return list(value) if is_sequence(value) else [value]
