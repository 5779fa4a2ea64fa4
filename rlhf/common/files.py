"""Read JSON, read and write JSON lines, and write files and folders atomically."""

from __future__ import annotations

import contextlib
import errno
import glob
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from rlhf.common.columns import Columns, check_columns
from rlhf.errors import UserError

_WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full; free space",
    errno.EDQUOT: "the disk quota is used up; free space",
    errno.EFBIG: "a file exceeds the limit of file sizes; raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only; make it writable",
    errno.EACCES: "permission denied; change the permissions",
    errno.EPERM: "permission denied; change the permissions",
    errno.EIO: "reading or writing failed; check the disk and its free space",
}
"""Number of a file system error -> what is wrong and what to do."""
_DAY_SECONDS = 86400.0


def find_write_error(error: BaseException | None) -> OSError | None:
    """Return the write error that caused an exception, or None if the cause is not a write error.

    A write error is an OSError whose number is in `_WRITE_ERRORS`. safetensors and torch.save raise
    other exceptions. The message of a safetensors exception contains the error number. A
    RuntimeError of torch.save has the OSError as its context, or reports a C++ stream error. For a
    stream error, an OSError with EIO is returned. The error of ``shutil.copytree`` has no number,
    but lists the messages of all files.
    """
    if isinstance(error, shutil.Error) and (match := re.search(r"\[Errno (\d+)\]", str(error))):
        return find_write_error(OSError(int(match[1]), os.strerror(int(match[1]))))
    if isinstance(error, OSError):
        return error if error.errno in _WRITE_ERRORS else None
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        return find_write_error(OSError(int(match[1]), os.strerror(int(match[1]))))
    if "iostream error" in str(error):
        return OSError(errno.EIO, os.strerror(errno.EIO))
    return find_write_error(error.__context__) if type(error) is RuntimeError else None


def describe_write_error(error: OSError) -> str:
    """Return a one-line message, without the path, that says what is wrong and what to do."""
    if (
        error.errno == errno.ENOSPC
        and error.filename
        and _has_no_free_inodes(Path(str(error.filename)))
    ):
        return "the file system has no free inodes; remove files"
    return _WRITE_ERRORS.get(error.errno or 0, str(error.strerror or error))


def _has_no_free_inodes(path: Path) -> bool:
    """Return whether the file system of a path, which need not exist, has no inode left."""
    if not hasattr(os, "statvfs"):  # Windows
        return False
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            status = os.statvfs(folder)
            return status.f_files > 0 and status.f_favail == 0
    return False


@contextlib.contextmanager
def add_path_to_write_errors(path: Path) -> Iterator[None]:
    """Return a context manager that adds the written path to the errors in `_WRITE_ERRORS`.

    These errors are raised as an OSError with ``path`` as its file name. Other exceptions, and an
    OSError that has a path, are raised unchanged.
    """
    try:
        yield
    except Exception as error:
        cause = find_write_error(error)
        if cause is None or cause.filename:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def append_text(path: Path, text: str) -> None:
    """Append text to a file; if writing fails, restore its old content, or remove a new file."""
    size = path.stat().st_size if path.exists() else None
    with add_path_to_write_errors(path):
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            if size is not None:
                os.truncate(path, size)
            else:
                path.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Return a context manager that writes or replaces a file or a folder atomically.

    The block writes to the yielded path, which is a hidden temporary path in the same folder; the
    folder is created if necessary. When the block ends, the temporary file or folder replaces the
    target. If the block raises an exception, the temporary file or folder is removed, and the
    target is unchanged. If the process is killed earlier, the target is unchanged, and the next
    writer removes the temporary file or folder. Several processes may write the same file at the
    same time; the content of the last writer remains.

    A folder is replaced in two steps: the old folder is renamed to ``.NAME.rlhf-old``, then the new
    folder to ``NAME``. If the process is killed between the two steps, the next writer or
    `restore_interrupted_writes` restores the old folder. Only one process at a time may replace a
    folder.
    """
    partial = target.with_name(f".{target.name}{_partial_suffix()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_or_restore_old(_old_path(target))
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.rlhf-part"):
        if path == partial or _is_abandoned(path):
            remove(path)
    try:
        with add_path_to_write_errors(target):
            yield partial
        if target.is_dir():
            target.rename(_old_path(target))
        partial.replace(target)
        flush_to_disk(target.parent)
    finally:
        remove(partial)
        _remove_or_restore_old(_old_path(target))


def restore_interrupted_writes(folder: Path) -> None:
    """Restore old folders and remove temporary files that killed processes left.

    The folder and its direct subfolders are searched.
    """
    for old in (*folder.glob(".*.rlhf-old"), *folder.glob("*/.*.rlhf-old")):
        _remove_or_restore_old(old)
    for path in (*folder.glob(".*.rlhf-part"), *folder.glob("*/.*.rlhf-part")):
        if _is_abandoned(path):
            remove(path)


def _old_path(target: Path) -> Path:
    """Return the path to which `atomic_path` temporarily renames the old folder."""
    return target.with_name(f".{target.name}.rlhf-old")


def _remove_or_restore_old(old: Path) -> None:
    """Remove the old folder of `atomic_path` if the new folder exists; otherwise restore it."""
    target = old.with_name(old.name.removeprefix(".").removesuffix(".rlhf-old"))
    if target.exists():
        remove(old)
    elif old.exists():
        old.rename(target)


def _partial_suffix() -> str:
    """Return the end of the names of this process's temporary files."""
    return f".{_host_name()}.{os.getpid()}.rlhf-part"


def _host_name() -> str:
    """Return the first 16 characters of the name of this machine, with hyphens instead of dots."""
    return platform.node().replace(".", "-")[:16]


def _is_abandoned(partial: Path) -> bool:
    """Return whether the process that was writing a temporary file or folder has ended.

    The processes of other machines cannot be checked. A temporary file or folder of another machine
    counts as abandoned if it was not modified for a day.
    """
    host, process = partial.name.split(".")[-3:-1]
    if host == _host_name() and process.isdecimal():
        return not _is_running(int(process))
    return time.time() - partial.stat().st_mtime > _DAY_SECONDS


def _is_running(pid: int) -> bool:
    """Return whether a process with this id exists on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_temporary_name(name: str) -> bool:
    """Return whether a name is one that `atomic_path` gives to new or to old content."""
    return name.startswith(".") and name.endswith((".rlhf-part", ".rlhf-old"))


def is_temporary_name_of_this_process(name: str) -> bool:
    """Return whether `atomic_path` of this process gives this name to new content."""
    return name.startswith(".") and name.endswith(_partial_suffix())


def is_partial_path(path: Path) -> bool:
    """Return whether a path is one to which `atomic_path` writes before it replaces the target."""
    return path.name.startswith(".") and path.name.endswith(".rlhf-part")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; lone surrogates are written as their JSON escapes."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def flush_to_disk(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expand_user(path: str | Path) -> Path:
    """Return a path with the home directory instead of ``~`` or ``~NAME`` at its start.

    If the home directory is unknown, the path is unchanged, as in a shell. `Path.expanduser` and
    `Path.home` raise RuntimeError instead.
    """
    return Path(os.path.expanduser(path))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal notation."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of a JSON-lines file, with the line break."""
    return _json_text(row) + "\n"


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects in a JSON-lines file (.gz allowed); blank lines are skipped.

    Raises:
        UserError: A line is not a JSON object, or an object has a key twice; the message names the
            file and the line.
        UnicodeDecodeError: The file is not UTF-8 text.
    """
    path = Path(path)
    with open_text(path, newline="\n") as stream:
        return [
            parse_json_line(line, f"{path}, line {number}")
            for number, line in enumerate(stream, start=1)
            if line.strip()
        ]


def read_log(path: Path, columns: Columns | None = None) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file that a run may still be writing (see `iterate_log`)."""
    return list(iterate_log(path, columns))


def iterate_log(path: Path, columns: Columns | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file that a run may still be writing.

    If the file does not exist, nothing is yielded. A killed or running process can leave an
    incomplete last line, which may end in the middle of a multi-byte character. Such a line is
    skipped.

    Args:
        path: The file.
        columns: Keys to check in every row; None checks nothing.

    Raises:
        UserError: A complete line is not a JSON object, or does not have the columns.
    """
    if not path.is_file():
        return
    # The last character may be incomplete: invalid UTF-8 bytes are read as lone surrogates.
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith("\n") and not _is_complete_json(line):
                return
            if line.strip():
                where = f"{path}, line {number}"
                row = parse_json_line(line, where)
                check_columns(row, columns or {}, where)
                yield row


def read_json(path: Path) -> Any:
    """Return the content of a JSON file (.gz allowed).

    Raises:
        UserError: The content cannot be read as JSON; the message names the file, and for invalid
            JSON the line. For an object with the same key twice, the message names the line on
            which the item of a list begins, or line 1.
    """
    with open_text(path) as stream:
        try:
            text = stream.read()
        except UnicodeDecodeError as error:
            problem = f"{error.reason} at byte {error.start}"
            raise UserError(f"{path}: not UTF-8 text ({problem})") from None
        try:
            return _DECODER.decode(text)
        except RepeatedKeyError as error:
            problem = f"line {_line_of_repeated_key(text)}: {error}"
        except json.JSONDecodeError as error:
            hint = (
                "; if the file has one object per line, rename it to .jsonl"
                if error.msg == "Extra data"
                else ""
            )
            problem = f"line {error.lineno}: broken JSON, {error.msg}{hint}"
        except (ValueError, RecursionError) as error:
            problem = _unreadable_message(error)
    raise UserError(f"{path}, {problem}")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per line and return the number of lines.

    The file is written atomically. It is compressed with gzip if its name ends in .gz. Equal rows
    give a file with equal bytes.

    Raises:
        ValueError: A row contains NaN or an infinite number.
    """
    path = Path(path)
    count = 0
    with atomic_path(path) as partial, partial.open("wb") as raw:
        packed = gzip.GzipFile("", "wb", 6, raw, 0) if path.suffix == ".gz" else raw
        for row in rows:
            packed.write(_json_text(row, allow_nan=False).encode() + b"\n")
            count += 1
        if packed is not raw:
            packed.close()
    return count


def open_text(path: Path, newline: str | None = None) -> io.TextIOBase:
    """Open a UTF-8 text file for reading.

    A byte order mark is skipped. The file is decompressed if its name ends in .gz.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    return cast(io.TextIOBase, opener(path, "rt", encoding="utf-8-sig", newline=newline))


def parse_json_line(line: str, where: str) -> dict[str, Any]:
    """Return the object in a line of a JSON-lines file.

    Raises:
        UserError: The line is not a JSON object, or an object has a key twice; the message begins
            with ``where``.
    """
    try:
        row = _DECODER.decode(line)
    except RepeatedKeyError as error:
        raise UserError(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON, {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {_unreadable_message(error)}") from None
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: expected an object {{...}}, found a value of type {type(row).__name__}"
        )
    return row


def _object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object with these keys and values.

    Raises:
        RepeatedKeyError: A key occurs twice.
    """
    unique = dict(pairs)
    if len(unique) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        key = next(key for key, count in counts.items() if count > 1)
        raise RepeatedKeyError(f"the key {key!r} occurs twice in an object; remove one of them")
    return unique


class RepeatedKeyError(ValueError):
    """Error for a JSON object that has the same key twice. Python would keep the last value."""


_DECODER = json.JSONDecoder(object_pairs_hook=_object_with_unique_keys)
_SPACE = re.compile(r"\s*")


def _line_of_repeated_key(text: str) -> int:
    """Return the line on which the item of a JSON list begins that has the same key twice.

    The result is 1 if the text is not a list.
    """
    position = _end_of_space(text, 0)
    while text[position : position + 1] in ("[", ","):
        start = _end_of_space(text, position + 1)
        try:
            _, end = _DECODER.raw_decode(text, start)
        except ValueError:
            return text.count("\n", 0, start) + 1
        position = _end_of_space(text, end)
    return 1


def _end_of_space(text: str, start: int) -> int:
    """Return the index of the first character from ``start`` on that is not whitespace."""
    space = _SPACE.match(text, start)
    return space.end() if space else start


def _is_complete_json(text: str) -> bool:
    """Return whether a text is valid JSON; JSON that exceeds the limits of Python is valid."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        pass  # `parse_json_line` reports the problem
    return True


def _json_text(row: Mapping[str, Any], *, allow_nan: bool = True) -> str:
    """Return a row as JSON text with unescaped non-ASCII characters.

    Only lone surrogates are escaped, because UTF-8 cannot encode them.
    """
    text = json.dumps(row, ensure_ascii=False, allow_nan=allow_nan)
    return text.encode(errors="backslashreplace").decode()


def _unreadable_message(error: Exception) -> str:
    """Return the message for valid JSON that has too many digits or too many nested brackets."""
    return f"JSON that cannot be read ({str(error).partition(';')[0]})"


def is_utf8_encodable(text: str) -> bool:
    """Return whether a text can be encoded in UTF-8, that is, has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
