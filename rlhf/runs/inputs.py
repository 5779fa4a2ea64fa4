"""Fingerprints of the local input files of a run, to detect changes when the run is resumed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.common.files import read_json, sha256_of
from rlhf.common.objects import is_object_reference, object_fingerprint
from rlhf.common.plugins import (
    CODE_KEYS,
    WHOLE_MODULE_KEYS,
    code_file,
    installed_plugin_files,
    split_reference,
)
from rlhf.runs.claim import MARKER

PATH_KEYS = frozenset(
    {"answers", "bench", "data_dir", "folder", "path", "paths", "policy", "reference"}
)
"""Configuration keys whose value may be the path of a local file or folder, or a list of paths."""
GAME_FOLDER_KEY = "env.kwargs.folder"
"""Key of the folder to which an environment writes compiled games. Its content may change during a
run. In the settings of a study, this key has a prefix."""
FULL_READ_BYTES = 64 * 2**20
"""Maximum size in bytes of a file that is read completely. For larger files, only blocks at equal
distances are read."""
NUM_BLOCKS, BLOCK_BYTES = 32, 2**20
"""Number of blocks that are read from a large file, and size of a block in bytes."""


def leaf_items(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each value in nested mappings and lists.

    A dotted key has the form ``data.0.path``. An empty mapping or list counts as a value.
    """
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaf_items(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and tree:
        for index, value in enumerate(tree):
            yield from leaf_items(value, f"{prefix}.{index}" if prefix else str(index))
    else:
        yield prefix, tree


def input_paths(config: Mapping[str, Any]) -> dict[str, Path]:
    """Return dotted key -> path for the existing local files and folders in a configuration.

    They include the files of plug-ins, and of functions and classes that the configuration names.
    """
    paths = {}
    for key, value in leaf_items(config):
        name = next((part for part in reversed(key.split(".")) if not part.isdecimal()), "")
        if not isinstance(value, str):
            continue
        is_code = name in WHOLE_MODULE_KEYS or (name in CODE_KEYS and split_reference(value)[1])
        if name in PATH_KEYS and _path_exists(value):
            paths[key] = Path(value)
        elif is_code and (file := code_file(value)):
            paths[key] = file
    return paths


def input_fingerprints(config: Mapping[str, Any]) -> dict[str, str]:
    """Return dotted key -> fingerprint for every local input in a configuration.

    The folder with the key `GAME_FOLDER_KEY` is omitted. The plug-ins of installed packages have
    the key "plug-in NAME". The fingerprint of an object of a Python program is that of its source
    code and of the values that it captured; an object without source code is omitted.
    """
    objects = {
        key: digest
        for key, value in leaf_items(config)
        if isinstance(value, str) and is_object_reference(value)
        if (digest := object_fingerprint(value))
    }
    paths = input_paths(config)
    installed = {f"plug-in {name}": path for name, path in installed_plugin_files().items()}
    files = {
        key: fingerprint(path)
        for key, path in (paths | installed).items()
        if not f".{key}".endswith(f".{GAME_FOLDER_KEY}")
    }
    return files | objects


def fingerprint(path: Path) -> str:
    """Return a hexadecimal digest of the content of a file or folder.

    The digest of a folder includes the relative paths and the contents of its files. It excludes
    hidden files and folders, and run directories below the folder, which change while a run writes.
    The digest of a folder with an adapter also includes the base model, if the base model is in a
    local folder. If both folders are moved together, the digest does not change, provided that the
    base is beside or in the folder of the adapter.
    """
    if path.is_file():
        return _file_fingerprint(path)
    digest = hashlib.sha256()
    runs = {marker.parent for marker in path.rglob(MARKER)} - {path}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and not hidden and runs.isdisjoint(file.parents):
            digest.update(f"{name.as_posix()} {_file_fingerprint(file)}\n".encode())
    if base := _adapter_base_folder(path):
        digest.update(fingerprint(base).encode())
    return digest.hexdigest()


def _file_fingerprint(path: Path) -> str:
    status = path.stat()
    return _cached_fingerprint(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _cached_fingerprint(path: Path, size: int, mtime_ns: int) -> str:
    """Return the digest of a file with ``size`` bytes.

    ``mtime_ns``, the time of the last change, is an argument so that it is part of the cache key.
    """
    del mtime_ns
    if size <= FULL_READ_BYTES:
        return sha256_of(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in range(NUM_BLOCKS):
            file.seek(block * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _adapter_base_folder(folder: Path) -> Path | None:
    """Return the local folder with the base model of an adapter, or None.

    It is None too if the recorded path is relative to ``folder``.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not base:
        return None
    if not Path(base).is_absolute() and (folder / base).is_dir():
        return None
    # A run names its copy of the base by an absolute path, which is wrong after the run is moved.
    name, recorded = Path(base).name, Path(base)
    copies = (folder / name, recorded, folder.parent / name)
    candidates = copies if recorded.is_absolute() else (recorded,)
    return next((path for path in candidates if path.is_dir()), None)


def _path_exists(value: str) -> bool:
    try:
        return bool(value) and Path(value).exists()
    except (OSError, ValueError):  # too long for a path, or with a null character
        return False
