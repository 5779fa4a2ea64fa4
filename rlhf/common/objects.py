"""Objects of a Python program that a configuration names, such as functions and environments.

A configuration is plain data. A function or class that another process can import is named as
``module:name``. Any other object has a name that begins with ``object:`` and is known only in the
program that gave it.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from typing import Any

from rlhf.errors import UserError

PREFIX = "object:"

_objects: dict[str, Any] = {}


def reference_to(value: Any, key: str) -> str:
    """Return the name of an object for a configuration.

    Args:
        value: A function, a class or any other object.
        key: Configuration key of the object.
    """
    if name := _importable_name(value):
        return name
    label = getattr(value, "__name__", None) or type(value).__name__
    reference = f"{PREFIX}{key}.{label.strip('<>')}"
    _objects[reference] = value
    return reference


def is_object_reference(reference: str) -> bool:
    """Return whether a name is that of an object of a Python program."""
    return reference.startswith(PREFIX)


def object_of(reference: str, *, what: str) -> Any:
    """Return the object of a name.

    Raises:
        UserError: This process does not have the object.
    """
    if reference not in _objects:
        raise UserError(
            f"{what}: {reference} is an object of a Python program, which this process does not "
            "have: start or resume the run from that program; or define the object in a file and "
            "write file.py:name, which other processes can import"
        )
    return _objects[reference]


def object_fingerprint(reference: str) -> str | None:
    """Return a digest of the source code of an object; None if it has none."""
    value = _objects.get(reference)
    if value is None:
        return None
    code = value if inspect.isfunction(value) or inspect.isclass(value) else type(value)
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def _importable_name(value: Any) -> str | None:
    """Return ``module:name`` if a new process can import the object under this name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    if module in ("__main__", "builtins") or module.startswith("rlhf_plugin_"):
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is value else None
