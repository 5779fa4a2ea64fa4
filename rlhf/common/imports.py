"""Import an object by its name, and check that optional packages are installed."""

from __future__ import annotations

import importlib.util
from typing import Any

from rlhf.common.names import did_you_mean
from rlhf.common.objects import is_object_reference, object_of
from rlhf.common.plugins import load_module, split_reference
from rlhf.errors import UserError


def import_object(path: Any, *, what: str = "import") -> Any:
    """Import the object that a path such as ``package.module:Class.method`` names.

    Args:
        path: The dotted name of a module or the path of a Python file, a colon, and the dotted name
            of the object in the module; or the name of an object of this program
            (``object:``). Anything but a text is returned unchanged, because the entry of a
            plug-in in a table can be the object itself.
        what: Start of error messages: the configuration key, or the purpose of the import.

    Raises:
        UserError: The path has no colon, the module cannot be imported, or the object does not
            exist in the module or in this program.
    """
    if not isinstance(path, str):
        return path
    if is_object_reference(path):
        return object_of(path, what=what)
    module, attributes = split_reference(path)
    if not attributes:
        raise UserError(f"{what}: write the path as module:name or as file.py:name, got {path!r}")
    value: Any = load_module(module, what=what)
    for attribute in attributes.split("."):
        if not hasattr(value, attribute):
            public = [name for name in dir(value) if not name.startswith("_")]
            raise UserError(f"{what}: {path!r} does not exist{did_you_mean(attribute, public)}")
        value = getattr(value, attribute)
    return value


def check_extra_installed(feature: str, extra: str, *packages: str) -> None:
    """Check that the packages of an optional extra are installed.

    Args:
        feature: What needs the extra, such as ``rlhf tune``.
        extra: Name of the extra.
        *packages: Names under which its packages are imported.

    Raises:
        UserError: A package is not installed. The message contains the command that installs it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f'{feature} needs {package}: pip install "rlhf-kit[{extra}]"')
