"""The classes that a configuration consists of."""

import dataclasses
import typing


def dataclasses_of(cls: type) -> set[type]:
    """A configuration class and every dataclass that its fields mention."""
    found, todo = set(), [cls]
    while todo:
        current = todo.pop()
        if dataclasses.is_dataclass(current) and current not in found:
            found.add(current)
            todo += typing.get_type_hints(current).values()
        else:
            todo += typing.get_args(current)
    return found
