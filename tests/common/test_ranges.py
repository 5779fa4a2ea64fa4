"""Ranges of annotated types: what is accepted, refused and shown."""

import math
import typing
from dataclasses import dataclass

import pytest

from rlhf.cli.table import COMMANDS
from rlhf.common.imports import import_object
from rlhf.common.ranges import (
    Finite,
    Fraction,
    FractionBelowOne,
    LabelNoise,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProperFraction,
    Seed,
    check_fields,
    convert_to_type,
    range_text,
)
from rlhf.errors import UserError
from tests.helpers.config_classes import dataclasses_of


@pytest.mark.parametrize(
    ("hint", "value", "rule"),
    [
        (PositiveInt, 0, ">= 1, got 0"),
        (PositiveInt, 2**31, "<= 2147483647, got 2147483648"),
        (PositiveInt, 1e20, "a smaller integer, got 1e+20"),
        (PositiveInt, 1.5, "a valid integer"),
        (NonNegativeInt, -1, ">= 0, got -1"),
        (PositiveFloat, 0.0, "> 0, got 0.0"),
        (PositiveFloat, math.inf, "a finite number, got inf"),
        (PositiveFloat, math.nan, "a finite number, got nan"),
        (Finite, -math.inf, "a finite number, got -inf"),
        (Finite, "nan", "a finite number, got 'nan'"),
        (Fraction, 1.01, "<= 1, got 1.01"),
        (FractionBelowOne, 1, "< 1, got 1"),
        (ProperFraction, 0, "> 0, got 0"),
        (LabelNoise, 0.5, "< 0.5, got 0.5"),
        (LabelNoise, math.nan, "< 0.5, got nan"),
        (Seed, 2**63, "< 9223372036854775808"),
        (PositiveInt | None, "x" * 500, "a valid integer, got 'xxx"),
        (PositiveInt, True, "a number, got True"),
        (Fraction | None, False, "a number, got False"),
    ],
)
def test_values_outside_a_range_are_refused_in_one_short_line(hint, value, rule):
    with pytest.raises(UserError) as caught:
        convert_to_type(hint, value, "a.key")
    assert str(caught.value).startswith(f"a.key must be {rule}")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("hint", "value"),
    [(PositiveInt, 1), (NonNegativeInt, 0), (Fraction, 1), (ProperFraction, 1e-300), (Seed, 0)],
)
def test_ends_of_ranges(hint, value):
    assert convert_to_type(hint, value) == value


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (PositiveInt, ">=1"),
        (PositiveFloat, ">0"),
        (Finite, ""),
        (Fraction, "[0,1]"),
        (ProperFraction, "(0,1)"),
        (LabelNoise, "[0,0.5)"),
        (Seed, ">=0"),
        (int, ""),
    ],
)
def test_ranges_in_the_help(hint, text):
    assert range_text(hint) == text


@dataclass
class Pair:
    count: PositiveInt = 1
    share: Fraction | None = None


def test_fields_of_an_instance():
    check_fields(Pair())
    with pytest.raises(UserError, match=r"^x\.share must be <= 1, got 2$"):
        check_fields(Pair(share=2), "x.")


@dataclass
class Nested:
    counts: list[PositiveInt]
    inner: Pair
    weights: dict[str, Finite]
    is_on: bool = False


def test_a_boolean_inside_a_value_is_not_a_number():
    """The conversion of pydantic would read true as 1."""
    tree = {"counts": [1], "inner": {"count": 2}, "weights": {"a": 0.5}, "is_on": True}
    assert convert_to_type(Nested, tree) == Nested([1], Pair(2), {"a": 0.5}, True)
    for change, key in (
        ({"counts": [1, True]}, "counts.1"),
        ({"inner": {"share": True}}, "inner.share"),
        ({"weights": {"a": False}}, "weights.a"),
    ):
        with pytest.raises(UserError, match=f"^{key} must be a number, got (True|False)$"):
            convert_to_type(Nested, tree | change)


def numbers_in(hint: typing.Any) -> bool:
    """Whether a type contains a number without a range."""
    if typing.get_origin(hint) is typing.Annotated:
        return False
    return hint in (int, float) or any(map(numbers_in, typing.get_args(hint)))


def test_every_number_in_a_configuration_has_a_range():
    classes = {c for row in COMMANDS.values() for c in dataclasses_of(import_object(row.config))}
    bare = [
        f"{cls.__name__}.{name}"
        for cls in classes
        for name, hint in typing.get_type_hints(cls, include_extras=True).items()
        if numbers_in(hint)
    ]
    assert bare == []


def test_an_integer_with_too_many_digits_is_a_user_error():
    """Python cannot write such an integer as text."""
    with pytest.raises(UserError, match=r"^key must be .*, got a value of type int with too many"):
        convert_to_type(PositiveInt, 10**5000, "key")
