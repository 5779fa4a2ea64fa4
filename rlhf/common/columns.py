"""Check the rows of the files that a run writes, which a person or a program may have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf.common.numbers import is_number
from rlhf.errors import UserError


@dataclass(frozen=True)
class Column:
    """A key of a row, and the values that it can have."""

    accepts: Callable[[Any], bool]
    description: str
    """The values in words, such as "a number"."""
    required: bool = True
    """Whether every row must have a value that is not null."""

    def as_optional(self) -> Column:
        """Return the same column for a key that rows need not have."""
        return replace(self, required=False)


Columns = Mapping[str, Column]
"""Key -> column."""


def check_columns(row: Mapping[str, Any], columns: Columns, where: str) -> None:
    """Check the keys and the types of a row. Other keys are allowed.

    Args:
        row: The row.
        columns: The keys that the readers of the file use.
        where: File and line, for the message.

    Raises:
        UserError: A required key is missing or null, or a value has another type.
    """
    for key, column in columns.items():
        value = row.get(key)
        if value is None:
            if column.required:
                raise UserError(f"{where}: no {key}; the file is damaged, or of another kind")
        elif not column.accepts(value):
            raise UserError(f"{where}: {key} is not {column.description}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(turn, dict) for turn in value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_object_of_objects(value: Any) -> bool:
    known = [item for item in value.values() if item is not None] if _is_object(value) else None
    return known is not None and all(map(_is_object, known))


NUMBER = Column(is_number, "a finite number")
INTEGER = Column(_is_integer, "an integer")
TEXT = Column(lambda value: isinstance(value, str), "a text")
OBJECT = Column(_is_object, "an object")
OBJECTS = Column(_is_object_of_objects, "an object of objects")
MESSAGES = Column(_is_messages, "a list of messages")
