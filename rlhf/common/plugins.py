"""Load the user's own code: plug-ins, and files and modules that a configuration names.

A reference names code in one of these forms:

- ``my_code.py`` or ``my_package.my_module``: a plug-in, which is imported and registers what it
  defines with the decorators of `rlhf.plugins`.
- ``my_code.py:name`` or ``my_package.my_module:name``: an object.

Installed packages offer plug-ins with the entry point group `ENTRY_POINTS`.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.common.files import expand_user, sha256_of
from rlhf.common.foreign import describe_exception, is_library_file, limit_side_effects
from rlhf.common.names import did_you_mean
from rlhf.common.objects import is_object_reference
from rlhf.common.user_code import warn_if_slow
from rlhf.errors import UserError

log = logging.getLogger(__name__)

PLUGIN_API = 1
"""Version of the plug-in interface. A plug-in states the version that it was written for with
``plugin_api = 1``; another version is refused."""
ENTRY_POINTS = "rlhf.plugins"
"""Entry point group of installed plug-ins."""
CODE_KEYS = frozenset({"callback", "callbacks", "env", "id", "path", "plugins"})
"""Configuration keys whose values can be references to code."""
WHOLE_MODULE_KEYS = frozenset({"plugins"})
"""Keys of `CODE_KEYS` whose values can name a file or module without an object in it."""
_SLOW_IMPORT = "move slow work from the top level of the file into a function"
_PLUGINS_OF_PARENT = "RLHF_PLUGINS"
"""Environment variable with the loaded plug-ins, which worker processes load too."""


@dataclass(frozen=True)
class _LoadedFile:
    module: ModuleType
    digest: str
    """SHA-256 of the content that was executed."""


_loaded_files: dict[Path, _LoadedFile] = {}
_loading_references: list[str] = []
"""References of the plug-ins that are being imported, in the order in which their imports began."""
_user_files: set[str] = set()
"""Paths of the imported files and modules that are outside installed packages."""
_installed_plugins: dict[str, ModuleType] = {}
"""Name of the entry point -> module, for the installed plug-ins that were loaded."""


def current_plugin() -> str | None:
    """Return the reference of the plug-in that is being imported; None if there is none."""
    return _loading_references[-1] if _loading_references else None


def load_plugins(references: Iterable[str]) -> None:
    """Import plug-ins in order. A plug-in that is already imported is not imported again.

    If a plug-in is a file that has changed since it was imported, the file is executed again.
    Worker processes import the same plug-ins (see `load_plugins_of_parent`).

    Args:
        references: Paths of Python files, or names of modules.

    Raises:
        UserError: A plug-in does not exist, cannot be imported, or needs another version of the
            plug-in interface. If its code raises an exception, the message contains the file,
            the line and the reason.
    """
    for reference in references:
        if is_file_reference(reference):
            reference = os.path.abspath(expand_user(reference))
        load_module(reference, what="plugins")
        known = json.loads(os.environ.get(_PLUGINS_OF_PARENT, "[]"))
        if reference not in known:
            os.environ[_PLUGINS_OF_PARENT] = json.dumps([*known, reference])


def load_plugins_of_parent() -> None:
    """Import installed plug-ins, and those that the parent of this worker process has imported."""
    load_installed_plugins()
    load_plugins(json.loads(os.environ.get(_PLUGINS_OF_PARENT, "[]")))


def load_installed_plugins() -> None:
    """Import the plug-ins of installed packages.

    A plug-in that cannot be imported is skipped with a warning, because a broken package must not
    prevent runs that do not use it.
    """
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if entry.name in _installed_plugins:
            continue
        try:
            module = _import_module(entry.module, what=f"plug-in {entry.name}")
            _installed_plugins[entry.name] = module
        except UserError as error:
            log.warning("%s; the plug-in is skipped", error)


def load_module(reference: str, *, what: str) -> ModuleType:
    """Import the file or module that a reference without an object names.

    Args:
        reference: Path of a Python file, or name of a module.
        what: Start of error messages: the configuration key, or the purpose of the import.

    Raises:
        UserError: See `load_plugins`.
    """
    if is_file_reference(reference):
        return _import_file(expand_user(reference), what=what)
    if os.sep in reference:
        raise UserError(
            f"{what}: {reference} is not a Python file: give the path of a file whose name ends in "
            ".py, or the name of a module"
        )
    return _import_module(reference, what=what)


def is_file_reference(module: str) -> bool:
    """Return whether the module part of a reference is the path of a file."""
    return module.endswith(".py")


def split_reference(reference: str) -> tuple[str, str]:
    """Split a reference into its file or module, and the name of the object ("" if none)."""
    module, colon, name = reference.rpartition(":")
    return (module, name) if colon else (reference, "")


def object_name(reference: Any) -> str:
    """Return the name of the object in a reference to code; "" for any other value.

    For the reference of an object of a Python program (``object:``), the result is also "".
    """
    if not isinstance(reference, str) or is_object_reference(reference):
        return ""
    module, name = split_reference(reference)
    is_module = all(part.isidentifier() for part in module.split("."))
    return name if is_module or is_file_reference(module) else ""


def short_name(reference: str) -> str:
    """Return a reference for a report; in ``FILE:NAME``, the folder of the file is omitted."""
    module, name = split_reference(reference)
    return f"{Path(module).name}:{name}" if is_file_reference(module) and name else reference


def code_file(reference: str) -> Path | None:
    """Return the file of the code to which a reference refers; None if it is not known.

    The result is also None for an object of a Python program, and for the code of this toolkit,
    whose version is recorded in another way.
    """
    module, _ = split_reference(reference)
    if is_object_reference(reference):
        return None
    if is_file_reference(module):
        path = expand_user(module)
        return path if os.path.isfile(path) else None
    if module.partition(".")[0] == "rlhf":
        return None
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None) if loaded else _find_module_file(module)
    return Path(file) if file and os.path.isfile(file) else None


def installed_plugin_files() -> dict[str, Path]:
    """Return name -> file of the installed plug-ins that were imported."""
    files = {name: getattr(m, "__file__", None) for name, m in _installed_plugins.items()}
    return {name: Path(file) for name, file in files.items() if file}


def loaded_user_files() -> set[str]:
    """Return the paths of the imported files and modules of the user and of installed plug-ins."""
    return _user_files | {str(module.__file__) for module in _installed_plugins.values()}


def resolve_code_references(tree: Any, folder: Path, key: str = "") -> Any:
    """Return a configuration in which relative references to code are absolute.

    A run can then be continued from any working directory. A single reference under ``plugins``
    becomes a list.

    Args:
        tree: Plain data.
        folder: Folder to which relative paths refer: that of the configuration file.
        key: The configuration key of ``tree``.
    """
    if isinstance(tree, Mapping):
        items = dict(tree)
        if isinstance(items.get("plugins"), str):
            items["plugins"] = [items["plugins"]]
        return {k: resolve_code_references(value, folder, str(k)) for k, value in items.items()}
    if isinstance(tree, list):
        return [resolve_code_references(value, folder, key) for value in tree]
    if isinstance(tree, str) and key in CODE_KEYS:
        return _resolved_reference(tree, folder, whole_module=key in WHOLE_MODULE_KEYS)
    return tree


def _resolved_reference(reference: str, folder: Path, *, whole_module: bool) -> str:
    """Return a reference with an absolute path if it names a Python file relative to a folder.

    ``NAME`` names the file ``NAME.py`` if this file exists and no module NAME can be imported.
    Other references are returned unchanged.
    """
    module, name = split_reference(reference)
    if is_object_reference(reference) or (not name and not whole_module):
        return reference
    suffix = f":{name}" if name else ""
    if is_file_reference(module):
        return f"{os.path.normpath(folder.absolute() / expand_user(module))}{suffix}"
    if not module.isidentifier() or not os.path.isfile(folder / f"{module}.py"):
        return reference
    if module in sys.modules or _find_module_file(module):
        return reference
    return f"{os.path.normpath(folder.absolute() / module)}.py{suffix}"


def _import_module(name: str, *, what: str) -> ModuleType:
    """Import a module like `load_module`, and record it in `_user_files` if it is of the user."""
    if name in sys.modules:
        return importlib.import_module(name)  # waits if another thread imports it
    ours = name.partition(".")[0] == "rlhf"
    if not ours and (origin := _find_module_file(name)):
        _check_plugin_api_version(Path(origin), what=f"{what}: {name}")
    _loading_references.append(name)
    try:
        slow = warn_if_slow(f"{what}: the import of {name}", _SLOW_IMPORT)
        with contextlib.nullcontext() if ours else slow, limit_side_effects():
            module = importlib.import_module(name)
    except Exception as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError) and name.startswith(str(error.name)):
            hint = (
                f"; if the module is a file beside the configuration, give its path: {what}: "
                f"{name.replace('.', '/')}.py"
            )
        raise UserError(
            f"{what}: cannot import {name!r} ({_import_failure_text(error)}{hint})"
        ) from error
    finally:
        _loading_references.pop()
    file = getattr(module, "__file__", None)
    if file and not is_library_file(file):
        _user_files.add(file)
    return module


def _import_file(path: Path, *, what: str) -> ModuleType:
    """Execute a Python file as a module, unless the same content was executed before.

    The folder of the file is added to the end of ``sys.path``. For the errors, see `load_plugins`.
    """
    file = path.resolve()
    if not os.path.isfile(file):
        siblings = [p.name for p in file.parent.glob("*.py")] if os.path.isdir(file.parent) else []
        hint = did_you_mean(file.name, siblings)
        raise UserError(
            f"{what}: {path} does not exist{hint} (a relative path refers to the folder of the "
            "configuration file)"
        )
    digest = sha256_of(file)
    loaded = _loaded_files.get(file)
    if loaded and loaded.digest == digest:
        return loaded.module
    _check_plugin_api_version(file, what=f"{what}: {file.name}")
    if str(file.parent) not in sys.path:  # at the end, so that it hides no installed package
        sys.path.append(str(file.parent))
    module = _execute_as_module(file, _module_name(file), again=loaded is not None, what=what)
    _loaded_files[file] = _LoadedFile(module, digest)
    _user_files.add(str(module.__file__))
    return module


def _execute_as_module(file: Path, name: str, *, again: bool, what: str) -> ModuleType:
    """Return the module ``name``; execute its file if it is not imported yet, or if ``again``."""
    previous = sys.modules.get(name)
    if previous is not None and not again:
        return previous
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _loading_references.append(str(file))
    try:
        with warn_if_slow(f"{what}: the import of {file.name}", _SLOW_IMPORT), limit_side_effects():
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(
            f"{what}: {file.name} cannot be imported: {_import_failure_text(error)}"
            f"{_import_hint(error)}"
        ) from error
    finally:
        _loading_references.pop()
    return module


def _module_name(file: Path) -> str:
    """Return the name under which a file is imported.

    It is the name under which other modules import the file. If that name is not an identifier or
    belongs to a different module, the returned name contains a hash of the path.
    """
    stem = file.stem
    if stem.isidentifier():
        importlib.invalidate_caches()  # the file may be new
        imported = sys.modules.get(stem)
        origin = getattr(imported, "__file__", None) if imported else _find_module_file(stem)
        if origin and Path(origin).resolve() == file:
            return stem
    return f"rlhf_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"


def _find_module_file(module: str) -> str | None:
    """Return the file of a module that is not imported; None if there is no such module."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return spec.origin if spec else None


def _check_plugin_api_version(file: Path, *, what: str) -> None:
    """Check the version that a plug-in declares, without executing it.

    Raises:
        UserError: The version is not `PLUGIN_API`.
    """
    try:
        statements = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return  # importing the file reports the error
    for node in statements:
        if isinstance(node, ast.AnnAssign) and node.value is not None:  # plugin_api: int = 1
            node = ast.Assign([node.target], node.value)
        if isinstance(node, ast.Assign) and "plugin_api" in map(ast.unparse, node.targets):
            version = ast.unparse(node.value)
            if version != str(PLUGIN_API):
                raise UserError(
                    f"{what} needs version {version} of the plug-in interface, but this version of "
                    f"rlhf has version {PLUGIN_API}: install matching versions of both"
                )


def _import_hint(error: Exception) -> str:
    """Return the end of the message of a failed import: what to do; "" for a UserError."""
    if isinstance(error, ModuleNotFoundError):
        return "; install the package, or correct the name"
    return "" if isinstance(error, UserError) else "; correct the file"


def _import_failure_text(error: Exception) -> str:
    """Return the reason of a failed import, with file and line."""
    if isinstance(error, UserError):
        described = describe_exception(error).rpartition(" (")
        location = f" ({described[2]}" if described[1] else ""
        return f"{error}{location}"
    return describe_exception(error)
