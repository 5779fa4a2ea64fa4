"""Write and verify checksums of a folder, to detect damaged files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from rlhf.common.files import flush_to_disk, read_json, sha256_of, write_text
from rlhf.common.yaml_text import read_mapping_or_empty
from rlhf.errors import UserError

CHECKSUMS_FILE = "checksums.json"
"""Name of the file with the SHA-256 digests of other files in the same folder."""


class DamagedFolderError(UserError):
    """Error for a folder in which a file is missing or has a different content than recorded."""


def write_checksums(folder: Path, *, exclude: Collection[Path] = ()) -> None:
    """Write the checksums of the files in a folder to `CHECKSUMS_FILE`, and flush them to the disk.

    Args:
        folder: The folder.
        exclude: Files in the folder that the toolkit did not write, which get no checksum.
    """
    names = {path.relative_to(folder).as_posix() for path in exclude}
    digests = {name: digest for name, digest in digests_of(folder).items() if name not in names}
    for name in digests:
        flush_to_disk(folder / name)
    _write_digests(folder, digests)


def digests_of(folder: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 digest of the files in a folder, except checksum files."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS_FILE)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


def write_file_list(folder: Path, marker: str, **content: Any) -> None:
    """Write a file that marks a folder as a result and lists the digests of its files.

    Args:
        folder: The folder, which is complete.
        marker: Name of the file.
        content: Further content of the file.
    """
    write_text(folder / marker, json.dumps({**content, "files": digests_of(folder)}) + "\n")


def check_folder_is_unchanged(folder: Path, marker: str, what: str) -> None:
    """Check that a folder may be replaced: it has only files of `write_file_list`, unchanged.

    Args:
        folder: The folder.
        marker: Name of the file that `write_file_list` wrote.
        what: What such a folder is, with its article, such as "an export".

    Raises:
        UserError: The folder has another origin, or a file was added or changed since.
    """
    if not (folder / marker).is_file():
        raise UserError(f"{folder} is not {what}, so it is not replaced: choose another folder")
    digests = read_mapping_or_empty(folder / marker).get("files")
    if not isinstance(digests, dict):
        raise UserError(
            f"{folder / marker} does not list the files of the folder, so {folder} is not "
            "replaced: choose another folder"
        )
    for path in sorted(folder.rglob("*")):
        if path == folder / marker or (path.is_dir() and not path.is_symlink()):
            continue
        recorded = digests.get(path.relative_to(folder).as_posix())
        if path.is_symlink() or recorded is None or sha256_of(path) != recorded:
            raise UserError(
                f"{path} was added or changed by another program, so {folder} is not replaced: "
                "move the file away, or choose another folder"
            )


def update_checksum(file: Path) -> None:
    """Record the checksum of a changed file in its folder, if the folder has a checksum file."""
    folder = file.parent
    if (folder / CHECKSUMS_FILE).is_file():
        _write_digests(folder, _read_checksums(folder) | {file.name: sha256_of(file)})


def verify_checksums(folder: Path) -> None:
    """Verify every file that the checksum file of a folder lists.

    Raises:
        DamagedFolderError: The checksum file is missing or cannot be read, or a listed file is
            missing or has changed. The message contains the path of the file.
    """
    for name, digest in _read_checksums(folder).items():
        path = folder / name
        if not path.is_file():
            raise DamagedFolderError(f"{path} is missing")
        if sha256_of(path) != digest:
            raise DamagedFolderError(
                f"{path} is damaged: its checksum differs from the recorded one"
            )


def files_without_checksum(folder: Path) -> Iterator[Path]:
    """Yield the files and links of a folder that its checksum file does not list.

    If the folder has no checksum file, nothing is yielded.

    Raises:
        DamagedFolderError: The checksum file cannot be read.
    """
    if (folder / CHECKSUMS_FILE).is_file():
        listed = _read_checksums(folder)
        for path in sorted(folder.rglob("*")):
            is_file = path.is_symlink() or not path.is_dir()
            name = path.relative_to(folder).as_posix()
            if is_file and path.name != CHECKSUMS_FILE and name not in listed:
                yield path


def list_files_without_checksum(folder: Path) -> list[Path]:
    """Return the files of `files_without_checksum`; [] if the checksum file cannot be read."""
    try:
        return list(files_without_checksum(folder))
    except DamagedFolderError:
        return []


def _read_checksums(folder: Path) -> dict[str, Any]:
    """Return file name -> SHA-256 digest, as recorded in the checksum file of a folder.

    Raises:
        DamagedFolderError: The checksum file is missing or cannot be read.
    """
    path = folder / CHECKSUMS_FILE
    try:
        digests = read_json(path)
    except FileNotFoundError:
        raise DamagedFolderError(f"{path} is missing") from None
    except (OSError, ValueError):
        digests = None
    if not isinstance(digests, dict) or not digests:
        raise DamagedFolderError(f"{path} is damaged")
    return digests


def _write_digests(folder: Path, digests: dict[str, Any]) -> None:
    write_text(folder / CHECKSUMS_FILE, json.dumps(digests, indent=2))
    flush_to_disk(folder / CHECKSUMS_FILE)
