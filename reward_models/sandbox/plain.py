"""Encode the values that a program and its tests exchange as JSON.

Plain values are None, numbers, texts, bytes, collections and values of some library classes. An
instance of a subclass is sent as an instance of its plain base class, so a received value has no
method that the sender defined. Every other value is replaced by a reference, which the receiver
resolves.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable
from typing import Any

MakeReference = Callable[[Any], dict[str, Any]]
"""Function that returns the reference of a value that is not plain: a JSON object with one key."""
Resolve = Callable[[str, Any], Any]
"""Function that returns the value of a reference, given the key and the content."""

_COLLECTIONS = {"tuple": tuple, "set": set, "frozenset": frozenset}
_BYTES = {"bytes": bytes, "bytearray": bytearray}
_CONSTRUCTED: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "builtins.complex": lambda value: (value.real, value.imag),
    "builtins.range": lambda value: (value.start, value.stop, value.step),
    "collections.deque": lambda value: (list(value), value.maxlen),
    "fractions.Fraction": lambda value: (value.numerator, value.denominator),
    "decimal.Decimal": lambda value: (str(value),),
    "datetime.timedelta": lambda value: (value.days, value.seconds, value.microseconds),
    "datetime.datetime": lambda value: (*value.timetuple()[:6], value.microsecond),
    "datetime.date": lambda value: (value.year, value.month, value.day),
    "datetime.time": lambda value: (value.hour, value.minute, value.second, value.microsecond),
}
"""Class -> function that returns the arguments with which the constructor restores a value."""
_NUMERIC_DTYPE = re.compile(r"[<>|][biufc]\d{1,2}")


def encode(value: Any, make_reference: MakeReference) -> Any:
    """Return the JSON form of a value; ``make_reference`` encodes values that are not plain.

    Raises:
        RecursionError: A collection contains itself.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 53 else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(item, make_reference) for item in value]
    if isinstance(value, dict):
        return {
            "dict": [
                [encode(k, make_reference), encode(v, make_reference)] for k, v in value.items()
            ]
        }
    for name, kind in _COLLECTIONS.items():
        if isinstance(value, kind):
            return {name: [encode(item, make_reference) for item in value]}
    for name, kind in _BYTES.items():
        if isinstance(value, kind):
            return {name: value.hex()}
    return _encode_library_value(value, make_reference)


def _encode_library_value(value: Any, make_reference: MakeReference) -> Any:
    """Return the JSON form of a value of a library class; for any other value, a reference.

    Times with a time zone and arrays that are not numeric are also replaced by references.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray):
        if not _NUMERIC_DTYPE.fullmatch(value.dtype.str):
            return make_reference(value)
        if isinstance(value, numpy.floating):  # item() of an extended float is not a Python float
            return float(value)
        if isinstance(value, numpy.generic):
            return encode(value.item(), make_reference)
        return {"array": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
    for base in type(value).__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in _CONSTRUCTED and getattr(value, "tzinfo", None) is None:
            return {name: encode(list(_CONSTRUCTED[name](value)), make_reference)}
    return make_reference(value)


def decode(data: Any, resolve: Resolve) -> Any:
    """Return the value of a JSON form; ``resolve`` returns the values of references.

    Raises:
        Exception: Any exception, if the data is not a result of `encode`.
    """
    if isinstance(data, list):
        return [decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    [(kind, content)] = data.items()
    if kind == "int":
        return int(content, 16)
    if kind == "dict":
        return {decode(key, resolve): decode(value, resolve) for key, value in content}
    if kind in _COLLECTIONS:
        return _COLLECTIONS[kind](decode(item, resolve) for item in content)
    if kind in _BYTES:
        return _BYTES[kind].fromhex(content)
    if kind == "array":
        return _decode_array(*content)
    if kind in _CONSTRUCTED:
        module, _, name = kind.rpartition(".")
        constructor = getattr(importlib.import_module(module), name)
        return constructor(*decode(content, resolve))
    return resolve(kind, content)


def _decode_array(dtype: str, shape: list[int], hex_content: str) -> Any:
    """Return a numeric numpy array; raise ValueError if shape, dtype and size disagree."""
    import numpy

    if not _NUMERIC_DTYPE.fullmatch(dtype) or math.prod(shape) * int(dtype[2:]) * 2 != len(
        hex_content
    ):
        raise ValueError(f"not an array: {dtype} {shape}")
    return numpy.frombuffer(bytearray.fromhex(hex_content), dtype).reshape(shape)
