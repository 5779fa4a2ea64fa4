"""Objects of a Python program that a configuration names, such as functions and environments.

A configuration is plain data. A function or class that another process can import is named as
``module:name``. Any other object has a name that begins with ``object:`` and is known only in the
program that gave it.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import inspect
import sys
from collections.abc import Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

from rlhf.common.foreign import is_library_file
from rlhf.errors import UserError

OBJECT_PREFIX = "object:"

_objects_by_reference: dict[str, Any] = {}


class Representative:
    """Base class of objects of the toolkit that stand for code of the user.

    Attributes:
        represented: Name -> class, function or argument of the user.
    """

    represented: Mapping[str, Any]


def reference_to(value: Any, key: str) -> str:
    """Return the name of an object for a configuration.

    An object that another process cannot import is stored in this process, for `object_of`.

    Args:
        value: A function, a class or any other object.
        key: Configuration key of the object.
    """
    if name := _importable_name(value):
        return name
    label = getattr(value, "__name__", None) or type(value).__name__
    reference = f"{OBJECT_PREFIX}{key}.{label.strip('<>')}"
    _objects_by_reference[reference] = value
    return reference


def is_object_reference(reference: str) -> bool:
    """Return whether a name is that of an object of a Python program."""
    return reference.startswith(OBJECT_PREFIX)


def object_of(reference: str, *, what: str) -> Any:
    """Return the object of a name.

    Raises:
        UserError: This process does not have the object.
    """
    if reference not in _objects_by_reference:
        raise UserError(
            f"{what}: {reference} is an object of a Python program, which this process does not "
            "have: start or resume the run from that program; or define the object in a file and "
            "write file.py:name, which other processes can import"
        )
    return _objects_by_reference[reference]


def object_fingerprint(reference: str) -> str | None:
    """Return a digest of an object: its source code and the values that it captured.

    The values are texts, bytes, numbers, booleans, None, tuples of these, functions and classes, in
    closures, default values and `functools.partial`. Other values, such as models and lists, can
    change while a run uses them, and are omitted. The result is None if this process does not have
    the object, or if it has no source code.
    """
    value = _objects_by_reference.get(reference)
    parts = [] if value is None else _source_and_values(value, ())
    if not parts:
        return None
    return hashlib.sha256("\n".join(parts).encode(errors="surrogatepass")).hexdigest()


def _source_and_values(value: Any, outer: tuple[Any, ...]) -> list[str]:
    """Return the source code of an object and its captured values, as texts.

    For an instance, this is the source code of its class. A function or class of a library is
    represented by its name. The result is empty if there is no source code, or if the object is
    one of ``outer``.

    Args:
        value: The object.
        outer: The objects that captured it, which it can capture in turn.
    """
    if any(value is other for other in outer):
        return []
    outer = (*outer, value)
    if isinstance(value, functools.partial):
        arguments = {**dict(enumerate(value.args)), **value.keywords}
        return _source_and_values(value.func, outer) + _value_texts(arguments, outer)
    if inspect.ismethod(value):
        return _source_and_values(value.__func__, outer)
    if isinstance(value, Representative):
        return _value_texts(value.represented, outer)
    is_code = inspect.isfunction(value) or inspect.isclass(value)
    if is_code and _is_of_library(value):
        return [f"{value.__module__}.{value.__qualname__}"]
    try:
        source = inspect.getsource(value if is_code else type(value))
    except (OSError, TypeError):
        return []
    return [source, *(_value_texts(_captured_values(value), outer) if is_code else ())]


def _is_of_library(code: Any) -> bool:
    """Return whether a function or class is in a module that is not the user's own."""
    if code.__module__ == "__main__":
        return False
    file = getattr(sys.modules.get(code.__module__), "__file__", None)
    return file is None or is_library_file(file)


def _captured_values(code: Any) -> dict[Any, Any]:
    """Return name -> value of the default values and of the closure of a function.

    Variables that the function itself assigns, such as counters, are omitted.
    """
    if not inspect.isfunction(code):
        return {}
    values: dict[Any, Any] = dict(enumerate(code.__defaults__ or ()))
    values |= code.__kwdefaults__ or {}
    assigned = _assigned_cells(code.__code__)
    for name, cell in zip(code.__code__.co_freevars, code.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # the cell is empty
            values |= {} if name in assigned else {name: cell.cell_contents}
    return values


def _assigned_cells(code: CodeType) -> set[str]:
    """Return the variables of outer functions that a function or an inner function assigns."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_DEREF"}
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return names.union(*map(_assigned_cells, inner))


def _value_texts(values: Mapping[Any, Any], outer: tuple[Any, ...]) -> list[str]:
    """Return texts of the values that do not change, and of captured functions and classes."""
    texts = []
    for name, value in values.items():
        if _is_constant(value):
            texts.append(f"{name} = {value!r}")
        elif isinstance(value, functools.partial | FunctionType | MethodType | type):
            texts += [f"{name}:", *_source_and_values(value, outer)]
    return texts


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, str | bytes | int | float)


def _importable_name(value: Any) -> str | None:
    """Return ``module:name`` if a new process can import the object under this name, else None."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    if module in ("__main__", "builtins") or module.startswith("rlhf_plugin_"):
        return None
    named_object: Any = sys.modules.get(module)
    for part in name.split("."):
        named_object = getattr(named_object, part, None)
    return f"{module}:{name}" if named_object is value else None
