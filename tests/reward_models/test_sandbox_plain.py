"""Values cross between a program and its tests as plain data of the exact type."""

import datetime
import json
from collections import Counter, OrderedDict, deque, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pytest

from rlhf.reward_models.sandbox.plain import decode, encode

Point = namedtuple("Point", "x y")
One = IntEnum("One", {"ONE": 1})
AlwaysEqual = type("AlwaysEqual", (str,), {"__eq__": lambda self, other: True, "__hash__": None})


def refuse(*reference):
    raise TypeError(f"not plain: {reference}")


def sent(value):
    return decode(json.loads(json.dumps(encode(value, refuse))), refuse)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -1, 1 << 53, -(10**4000), 0.1, float("inf"), 5e-324, 2 - 1j),
        *("", "a\ud800\n", b"\x00\xff", bytearray(b"x"), [], [[1], (2, {3})], frozenset({1, (2,)})),
        *({}, {1: "a", (2,): [None]}, range(1, 9, 3), deque([1, 2], maxlen=3)),
        *(Fraction(-1, 3), Decimal("1.10"), datetime.date(2024, 2, 29)),
        *(
            datetime.datetime(2024, 1, 2, 3, 4, 5, 6),
            datetime.time(1, 2),
            datetime.timedelta(-1, 5),
        ),
    ],
)
def test_plain_values_return_unchanged(value):
    result = sent(value)
    assert type(result) is type(value)
    assert repr(result) == repr(value)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (AlwaysEqual("a"), "a"),
        (One.ONE, 1),
        (Point(1, 2), (1, 2)),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (np.float32(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
    ],
)
def test_subclasses_and_scalars_become_plain(value, plain):
    assert type(sent(value)) is type(plain)
    assert sent(value) == plain


@pytest.mark.parametrize("dtype", ["<f4", ">i8", "|b1", "<c16"])
def test_arrays_keep_dtype_shape_and_content(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    result = sent(array)
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize(
    "value", [object(), len, int, np.array([object()]), datetime.datetime.now(datetime.UTC)]
)
def test_other_values_need_a_reference(value):
    with pytest.raises(TypeError, match="not plain"):
        encode(value, refuse)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"list": []},
        {"int": 3},
        {"set": [[]]},
        {"dict": [1]},
        {"bytes": "zz"},
        {"int": "0x1", "set": []},
        {"os.system": ["true"]},
        {"builtins.eval": ["1"]},
        {"array": ["|O", [1], "00" * 8]},
        {"array": ["<f8", [1 << 60], "00"]},
    ],
)
def test_malformed_data_is_an_error(data):
    with pytest.raises((TypeError, ValueError, KeyError)):
        decode(data, refuse)
