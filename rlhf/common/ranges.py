"""Types of numeric configuration keys with their ranges, and the conversion that checks them."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeGuard

from annotated_types import Interval
from typing_extensions import is_typeddict

from rlhf.errors import UserError

MAX_INT32 = 2**31 - 1
"""Maximum of most integer keys: that of a signed 32-bit integer, which every library accepts."""

PositiveInt = Annotated[int, Interval(ge=1, le=MAX_INT32)]
NonNegativeInt = Annotated[int, Interval(ge=0, le=MAX_INT32)]
AtLeastTwo = Annotated[int, Interval(ge=2, le=MAX_INT32)]
"""Number of samples for a standard deviation, which needs at least two values."""
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
"""A seed that numpy and torch accept."""
Finite = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]
PositiveFloat = Annotated[float, Interval(gt=0, lt=math.inf)]
NonNegativeFloat = Annotated[float, Interval(ge=0, lt=math.inf)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
PositiveFraction = Annotated[float, Interval(gt=0, le=1)]
FractionBelowOne = Annotated[float, Interval(ge=0, lt=1)]
ProperFraction = Annotated[float, Interval(gt=0, lt=1)]
Port = Annotated[int, Interval(ge=0, le=65_535)]
"""Number of a TCP port; 0 chooses a free one."""
Seconds = Annotated[float, Interval(gt=0, le=1_000_000)]
"""A time limit in seconds, at most 11.6 days."""
LabelNoise = Annotated[float, Interval(ge=0, lt=0.5)]
"""Probability that the label of a pair is wrong."""


OTHER_KEYS_ALLOWED: Any = {"extra": "allow"}
"""``__pydantic_config__`` of a `TypedDict` whose values can have keys without a field."""


class UnmetConditionError(ValueError):
    """Error for a value of a configuration; the message is the condition, after "must be"."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """Annotation of a configuration key whose value is checked by a function.

    Args:
        text: The condition in the error message, after "must be".
        is_met: Returns whether a value of any type satisfies the condition.
    """

    text: str
    is_met: Callable[[Any], bool]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return the schema by which pydantic checks a value."""
        return {"type": "function-plain", "function": {"type": "no-info", "function": self._check}}

    def _check(self, value: Any) -> Any:
        if not self.is_met(value):
            raise UnmetConditionError(self.text)
        return value


def convert_to_type(hint: Any, value: Any, name: str = "") -> Any:
    """Convert plain data to the type ``hint``, and check the ranges of its numbers.

    Raises:
        UserError: A key is missing, or a value has the wrong type or is outside its range; the
            message names the key, with the prefix ``name``. If a ``__post_init__`` raises an
            error, the message is that of this error.
    """
    from pydantic import ValidationError  # slow to import

    _check_no_boolean_is_number(hint, value, name)
    try:
        return _type_adapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = first.get("ctx", {}).get("error")
        if reason and not isinstance(reason, UnmetConditionError):  # raised by a __post_init__
            raise UserError(str(reason)) from error
        key = ".".join(map(str, [*filter(None, [name]), *first["loc"]]))
        if first["type"] == "missing":
            raise UserError(f"{key} is required") from error
        # A key of a TypedDict that is not a text has the error "invalid_key".
        kind = "string_type" if first["type"] == "invalid_key" else first["type"]
        message = "a valid string" if kind != first["type"] else first["msg"]
        value = shortened_repr(first["input"])
        condition = str(reason) if reason else _condition_in_pydantic_message(message)
        hint = _yaml_hint(kind, first["input"])
        raise UserError(f"{key} must be {condition}, got {value}{hint}") from error


def check_fields(config: Any, prefix: str = "") -> None:
    """Check the fields of a dataclass that was created without `convert_to_type`.

    Raises:
        UserError: A value has the wrong type or is outside its range; the message contains the key,
            the rule and the value.
    """
    for name, hint in _type_hints(type(config)).items():
        convert_to_type(hint, getattr(config, name), f"{prefix}{name}")


def has_fields(hint: Any) -> TypeGuard[type]:
    """Return whether a type is a dataclass or a `TypedDict`, whose fields are keys."""
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or is_typeddict(hint))


def range_text(hint: Any) -> str:
    """Return the range of an annotated number, such as ``>=1`` or ``[0,1)``; "" if it has none.

    A limit of infinity, and an upper limit of `MAX_INT32` or more, are omitted.
    """
    annotations = getattr(hint, "__metadata__", ())
    for interval in (typing.cast(Any, item) for item in annotations if isinstance(item, Interval)):
        low = interval.gt if interval.ge is None else interval.ge
        high = interval.lt if interval.le is None else interval.le
        has_low = low is not None and low > -math.inf
        if high is None or high >= MAX_INT32:
            return f">{'=' * (interval.ge is not None)}{low}" if has_low else ""
        ends = "(" if interval.ge is None else "[", ")" if interval.le is None else "]"
        return f"{ends[0]}{low},{high}{ends[1]}"
    return ""


def shortened_repr(value: Any) -> str:
    """Return the repr of a value for an error message, truncated to 100 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an integer of more than 4,300 digits
        text = f"a value of type {type(value).__name__} with too many digits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_no_boolean_is_number(hint: Any, value: Any, key: str) -> None:
    """Raise UserError if a boolean is in the place of a number; pydantic would convert it."""
    members = [
        typing.get_args(member)[0] if typing.get_origin(member) is Annotated else member
        for member in (typing.get_args(hint) if _is_union(hint) else (hint,))
    ]
    if isinstance(value, bool):
        if (int in members or float in members) and bool not in members:
            raise UserError(f"{key} must be a number, got {value!r}")
        return
    prefix = f"{key}." if key else ""
    for member in members:
        kind, arguments = typing.get_origin(member), typing.get_args(member)
        if isinstance(value, list | tuple) and kind in (list, tuple):
            for index, item in enumerate(value):
                _check_no_boolean_is_number(arguments[0], item, f"{prefix}{index}")
        elif isinstance(value, Mapping) and (kind is dict or has_fields(member)):
            hints = _type_hints(member) if has_fields(member) else {}
            for name, item in value.items():
                hint_of_item = arguments[1] if kind is dict else hints.get(name)
                _check_no_boolean_is_number(hint_of_item, item, f"{prefix}{name}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _yaml_hint(kind: str, value: Any) -> str:
    """Return a hint on YAML for pydantic's error ``kind`` about a value; empty if there is none."""
    if kind == "list_type" and isinstance(value, str):
        return "; write a list in brackets: [A, B]"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return '; YAML reads some texts as other values unless they are in quotes: "no"'
    return ""


def _condition_in_pydantic_message(message: str) -> str:
    """Return the condition in an error message of pydantic, with symbols such as >=."""
    rule = message.removeprefix("Input should be ").replace("dictionary", "mapping")
    rule = re.sub(r", (unable|got) .*", "", rule)
    for words, sign in (("greater", ">"), ("less", "<")):
        rule = rule.replace(f"{words} than or equal to", f"{sign}=").replace(f"{words} than", sign)
    if rule.startswith("Unable to parse"):  # a text of more than 4,300 digits
        return "a smaller integer"
    return "a finite number" if rule in ("< inf", "> -inf") else rule


@functools.cache
def _type_adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)
