"""Compute fingerprints of a run's local input files, to detect changes before it is resumed."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.common.files import sha256_of

PATH_KEYS = frozenset({"path", "paths", "data_dir", "folder"})
"""Configuration keys whose value may be a local file or folder, or a list of them."""
FULL_READ_BYTES = 64 * 2**20
"""Files up to this size in bytes are read completely; larger files are sampled at equal spacing."""
BLOCKS, BLOCK_SIZE = 32, 2**20


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the plain values of nested mappings and lists with their keys, such as data.0.path."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and tree:
        for index, value in enumerate(tree):
            yield from leaves(value, f"{prefix}.{index}" if prefix else str(index))
    else:
        yield prefix, tree


def input_paths(config: Mapping[str, Any]) -> dict[str, Path]:
    """Return the existing local files and folders that a configuration names, by key."""
    paths = {}
    for key, value in leaves(config):
        name = next((part for part in reversed(key.split(".")) if not part.isdecimal()), "")
        if name in PATH_KEYS and isinstance(value, str) and _exists(value):
            paths[key] = Path(value)
    return paths


def fingerprints(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprint of every local input of a configuration, by key."""
    return {key: fingerprint(path) for key, path in input_paths(config).items()}


def fingerprint(path: Path) -> str:
    """Return a digest of the content of a file or of all files of a folder.

    Names and times are not included, except the names of files in a folder. An adapter includes its
    base model, if that is a local folder.
    """
    if path.is_file():
        return _file_fingerprint(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()} {_file_fingerprint(file)}\n".encode())
    if base := _base_of_adapter(path):
        digest.update(fingerprint(base).encode())
    return digest.hexdigest()


def _file_fingerprint(path: Path) -> str:
    status = path.stat()
    return _read_fingerprint(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _read_fingerprint(path: Path, size: int, changed: int) -> str:
    """Read a file of a size in bytes; the time of its last change is a part of the cache's key."""
    del changed
    if size <= FULL_READ_BYTES:
        return sha256_of(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in range(BLOCKS):
            file.seek(block * (size - BLOCK_SIZE) // (BLOCKS - 1))
            digest.update(file.read(BLOCK_SIZE))
    return digest.hexdigest()


def _base_of_adapter(folder: Path) -> Path | None:
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    inside = base and not Path(base).is_absolute() and (folder / base).is_dir()
    return None if not base or inside or not Path(base).is_dir() else Path(base)


def _exists(value: str) -> bool:
    try:
        return bool(value) and Path(value).exists()
    except (OSError, ValueError):  # too long for a path, or with a null character
        return False
