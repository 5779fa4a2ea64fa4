"""Folders with prepared data, which several runs and processes share.

An entry is a folder whose name contains a hash of everything that determines its content. It is
written under a temporary name and then renamed, so a killed process leaves no incomplete entry.
Only one process at a time prepares an entry; other processes wait for it and then read it. They do
not wait on Windows and on file systems without locks.
Checksums detect damaged entries, which are prepared again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf.common.files import atomic_path, expand_user, remove, sha256_of
from rlhf.errors import UserError
from rlhf.runs.checksums import DamagedFolderError, verify_checksums, write_checksums

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)


def cache_folder(configured_folder: str | None = None) -> Path:
    """Return the folder of the entries: `configured_folder`, or one in the cache of `datasets`."""
    if configured_folder:
        return expand_user(configured_folder)
    if folder := os.environ.get("HF_DATASETS_CACHE"):
        return Path(folder) / "rlhf"
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "datasets" / "rlhf"


def hash_of(**parts: Any) -> str:
    """Return a hash of the JSON form of named values, 32 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def content_hash(path: Path) -> str:
    """Return a hash of the content of a file, or of the names and contents of a folder's files."""
    if path.is_file():
        return sha256_of(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    names = {file.relative_to(path).as_posix(): sha256_of(file) for file in files}
    return hash_of(files=names)


def cached_entry(target: Path, build: Callable[[Path], None]) -> Path:
    """Return the folder of an entry. If it is missing or damaged, prepare it.

    Args:
        target: Folder of the entry.
        build: Function that writes the files of the entry to an empty folder.

    Raises:
        UserError: The folder of the cache cannot be written.
    """
    with _lock(target):
        if target.is_dir():
            try:
                verify_checksums(target)
                return target
            except DamagedFolderError as error:
                log.warning("%s: the data are prepared again", error)
                remove(target)
        with atomic_path(target) as partial:
            partial.mkdir()
            build(partial)
            write_checksums(partial)
    return target


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Return a context manager during which no other process prepares the entry ``target``.

    The lock is that of the operating system, so it ends with the process. There is no lock on
    Windows and on file systems without locks.

    Raises:
        UserError: The folder of the cache cannot be written.
    """
    path = target.with_name(f".{target.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(
            f"data_cache: {path.parent} cannot be written ({error.strerror}); set data_cache to "
            "another folder"
        ) from error
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process that prepares the same data")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # some network file systems have no locks
                log.info("%s has no locks (%s)", path.parent, error.strerror)
        yield
