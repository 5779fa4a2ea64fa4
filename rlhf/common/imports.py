"""Import an object by its name."""

from __future__ import annotations

import importlib
from typing import Any

from rlhf.common.foreign import limit_side_effects
from rlhf.common.names import did_you_mean
from rlhf.errors import UserError


def import_object(path: str, *, what: str = "import") -> Any:
    """Import the object that a path such as ``package.module:Class.method`` names.

    Args:
        path: The module's dotted name, a colon, and the dotted name of the object in the module.
        what: Start of error messages: the configuration key, or the purpose of the import.

    Raises:
        UserError: The path has no colon, the module cannot be imported, or the object does not
            exist in the module.
    """
    module_name, _, attributes = path.partition(":")
    if not attributes:
        raise UserError(f"{what}: write the path as module:name, got {path!r}")
    try:
        with limit_side_effects():
            value: Any = importlib.import_module(module_name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: cannot import {module_name!r} ({error})") from error
    for attribute in attributes.split("."):
        if not hasattr(value, attribute):
            public = [name for name in dir(value) if not name.startswith("_")]
            raise UserError(f"{what}: {path!r} does not exist{did_you_mean(attribute, public)}")
        value = getattr(value, attribute)
    return value
