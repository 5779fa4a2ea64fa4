"""Locks on output directories, so that only one process at a time writes to a directory.

A directory that the toolkit wrote contains the file ``.rlhf``. ``--overwrite`` moves the files of
the earlier run to ``.replaced``. If the new run ends without a result, the files are moved back.
Files that the toolkit did not write are not moved.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import platform
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf.common.files import (
    describe_write_error,
    expand_user,
    is_partial_path,
    is_temporary_name,
    is_temporary_name_of_this_process,
    read_json,
    remove,
    restore_interrupted_writes,
    write_text,
)
from rlhf.common.yaml_text import read_mapping_or_empty
from rlhf.errors import UserError
from rlhf.runs.alarms import HALTED_FOLDER
from rlhf.runs.checksums import CHECKSUMS_FILE, DamagedFolderError, files_without_checksum

MARKER = ".rlhf"
"""Name of a file in every directory that the toolkit wrote. The file contains the id and the host
of the process that writes to the directory, and the additional file names that it declared."""
LOCK = ".lock"
REPLACED = ".replaced"
LOCK_FILES = frozenset({MARKER, LOCK, REPLACED})

DESCRIPTIONS = frozenset(
    [
        "bench.yaml",
        "config.yaml",
        "data_counts.json",
        "environment.json",
        "inputs.json",
        "logs",
        "pipeline.yaml",
        "sweep.yaml",
        "tune.yaml",
    ]
)
"""Names of the files and folders that commands write before they have a result."""
BEFORE_FIRST_STEP = frozenset({"checkpoints", HALTED_FOLDER, "samples.jsonl"})
"""Names of the results that a training run may write before its first step. A run that wrote only
these files does not replace an earlier run."""
RESULTS = frozenset(
    [
        "bench.json",
        "bench.md",
        "checkpoints",
        "evaluation",
        "explanation.html",
        "explanation.json",
        "final",
        "finished",
        HALTED_FOLDER,
        "metrics.jsonl",
        "optuna.log",
        "overoptimization.json",
        "pages",
        "pairs.jsonl",
        "prompts.jsonl",
        "proxies",
        "report.html",
        "report_tables",
        "rl",
        "runs",
        "samples.jsonl",
        "tables",
        "tensorboard",
        "test.jsonl",
        "tracking_id",
        "train.jsonl",
        "trials",
        "trials.csv",
        "tuned.yaml",
        "wandb",
    ]
)
"""Names of the other files and folders that commands write."""
ONLY_WRITTEN_BY = {
    "bench": ("bench.json", "bench.md", "bench.yaml", "logs", "pages", "runs", "tables"),
    "explain": ("explanation.html", "explanation.json"),
    "overoptimize": ("overoptimization.json", "proxies", "rl"),
    "pairs": ("pairs.jsonl",),
    "reward-report": ("prompts.jsonl",),
    "run": ("pipeline.yaml",),
    "split": ("test.jsonl", "train.jsonl"),
    "sweep": ("logs", "runs", "sweep.yaml", "tables"),
    "tune": ("logs", "optuna.log", "runs", "trials", "trials.csv", "tune.yaml", "tuned.yaml"),
}
"""Command -> names of `DESCRIPTIONS` and `RESULTS` that only some commands write. Other commands do
not write them: in the directory of such a command, a file with such a name is a file of the user.
"""
NOT_WRITTEN_BY: dict[str, frozenset[str]] = dict.fromkeys(
    ("demos", "pairs", "split"),
    frozenset(
        [
            "evaluation",
            "final",
            HALTED_FOLDER,
            "metrics.jsonl",
            "samples.jsonl",
            "tensorboard",
            "tracking_id",
            "wandb",
        ]
    ),
)
"""Command that trains no model -> other names of `RESULTS` that it does not write."""
COMMAND_BY_DESCRIPTION = {
    "bench.yaml": "bench",
    "pipeline.yaml": "run",
    "sweep.yaml": "sweep",
    "tune.yaml": "tune",
}
"""Name of the description of a pipeline or study -> command that writes it."""
CONTAINERS = frozenset({"runs", "trials", "proxies", "rl"})
"""Names of the folders that contain run directories."""
WRITTEN_FILE_PATTERNS = {
    HALTED_FOLDER: r"(alarm\.json|metrics\.jsonl|evidence\.pt|((step-\d+|base)/.+))",
    "checkpoints": r"((step|checkpoint)-\d+|best|base|reference|runs|\..+\.rlhf-(part|old))/.+"
    r"|README\.md",
    "evaluation": r".+/(episodes\.jsonl|pair_scores\.jsonl|report\.md|summary\.json)",
    "logs": r"([\w.-]+-)?\d+\.log|slurm-\d+/(\d+(-\d+)?|array)\.(exit|log|sh|yaml)",
    "pages": r"[^/]+\.html|[^/]+_tables/[^/]+\.(csv|json|tex)",
    "report_tables": r"[^/]+\.(csv|json|tex)",
    "tables": r"[^/]+\.(csv|json|tex)",
    "tensorboard": r"(.+/)?events\.out\.tfevents\..+",
}
"""Name of a folder -> pattern of the paths of files that commands write to it."""
_REPLACED_FOLDERS = (DESCRIPTIONS | RESULTS | LOCK_FILES) - CONTAINERS
"""Names of the entries of a run directory that the next run replaces as a whole."""
MAX_NAME_BYTES = 200
"""Maximum length of the name of an output directory. Temporary names of its evaluation contain this
name and up to 36 other bytes, and most file systems limit a file name to 255 bytes."""


class DirectoryClaim:
    """A lock on an output directory, which this process holds from ``open`` to ``close``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = FileLock(directory / LOCK)
        self._existed = directory.exists()
        self._was_marked = False
        self._logs_are_kept = False
        # Names of the entries that existed before this process.
        self._earlier_names: frozenset[str] = frozenset()

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        resume: bool,
        overwrite: bool,
        command: str = "",
        required: Sequence[str] = (),
        inputs: Iterable[Path] = (),
    ) -> DirectoryClaim:
        """Create and lock a directory, or lock a directory that an earlier command wrote.

        Args:
            directory: The directory.
            resume: Whether to continue the run in an existing directory.
            overwrite: Whether to replace the files of an earlier command.
            command: The command that will write to the directory, or "" if it is unknown.
            required: Names of the files without which a directory cannot be resumed, such as
                config.yaml.
            inputs: Files and folders that the command reads and that must not be replaced.

        Raises:
            UserError: The path is not valid or is inside a folder of another run. Or the directory
                cannot be resumed, replaced or written, contains a file of the user where the
                command would write, or is locked by another process.
        """
        check_output_path(directory)
        if resume and overwrite:
            raise UserError(
                "resume continues a run and overwrite replaces it: give one of them, such as "
                "--resume --overwrite false"
            )
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory} is a file: choose another --output_dir")
        replaced = directory / REPLACED
        if replaced.is_symlink():
            raise UserError(
                f"{replaced} is a symbolic link, which the toolkit does not create: remove it, or "
                "choose another --output_dir"
            )
        if directory.exists() and (_entries_except_locks(directory) or replaced.exists()):
            if overwrite:
                _check_replaceable(directory, inputs)
            elif not resume:
                raise UserError(
                    f"{directory} exists already: continue the run with --resume, replace it with "
                    "--overwrite, or choose another --output_dir"
                )
            elif missing := _first_missing_file_for_resume(directory, required):
                raise UserError(f"{directory} has no {missing}, so there is nothing to resume")
        claim = cls(directory)
        with convert_write_errors_to_user_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            claim._acquire_lock()
            try:
                claim._take_over_directory(command, overwrite=overwrite)
            except BaseException:
                claim.close()
                raise
        return claim

    def declare_files(self, names: Iterable[str]) -> None:
        """Record the names of files and folders that this run writes and `RESULTS` lacks.

        Raises:
            UserError: The directory contains a file of the user with one of these names.
        """
        names = list(names)
        unknown = self._earlier_names.intersection(names).difference(
            _declared_entries(self.directory)
        )
        for path in (self.directory / name for name in sorted(unknown)):
            if not written_by_toolkit(path):
                raise foreign_file_error(path, self.directory)
        writer = {"pid": os.getpid(), "host": platform.node()}
        marker = {"writer": writer, "entries": sorted({*_declared_entries(self.directory), *names})}
        write_text(self.directory / MARKER, json.dumps(marker))

    def delete_replaced_files(self) -> None:
        """Delete the files of the replaced run; call this method after the first result."""
        aside = self.directory / REPLACED
        if aside.exists():
            for path in _entries_sorted_by_marker(aside, marker_first=False):
                remove(path)
            aside.rmdir()

    def keep_logs_without_result(self) -> None:
        """Keep the logs although there is no result, unless an earlier run is restored."""
        self._logs_are_kept = True

    def close(self) -> None:
        """Release the lock. If the run has no result, the earlier content is restored first."""
        if not self._lock.is_locked:
            return
        moved = not self.directory.exists()
        has_result = moved or self._keep_new_or_restore_old_run()
        self._lock.release()
        if not has_result and not self._was_marked:
            for name in (MARKER, LOCK):
                (self.directory / name).unlink(missing_ok=True)
            if not self._existed and not any(self.directory.iterdir()):
                self.directory.rmdir()

    def _acquire_lock(self) -> None:
        """Acquire the lock.

        Raises:
            UserError: Another process has the lock.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.directory} is in use by {_writer_text(self.directory)}: wait until it "
                "ends, or choose another --output_dir"
            ) from None

    def _take_over_directory(self, command: str, *, overwrite: bool) -> None:
        """Record this process as the writer of the locked directory.

        With ``overwrite``, the files of the earlier run are moved to `REPLACED`.
        """
        restore_interrupted_writes(self.directory)
        if (self.directory / REPLACED).exists():  # the process that moved the files was killed
            self._keep_new_or_restore_old_run()
        self._was_marked = written_by_toolkit(self.directory)
        self._earlier_names = frozenset(path.name for path in _entries_except_locks(self.directory))
        if overwrite and self._earlier_names:
            self._move_earlier_files_aside(command)
            self._earlier_names = frozenset(
                path.name for path in _entries_except_locks(self.directory)
            )
        self.declare_files(())

    def _move_earlier_files_aside(self, command: str) -> None:
        """Move the files of the earlier run to `REPLACED`.

        Raises:
            UserError: A folder of the earlier run contains a file that the toolkit did not write,
                or ``command`` would write to a file that the toolkit did not write.
        """
        written = entries_written_by_toolkit(self.directory)
        names = {path.name for path in written}
        stays = [path for path in _entries_except_locks(self.directory) if path.name not in names]
        in_the_way = sorted(path for path in stays if path.name in _names_written_by(command))
        in_folders = (file for path in written for file in files_not_written_by_toolkit(path))
        if foreign := next(itertools.chain(in_the_way, in_folders), None):
            raise foreign_file_error(foreign, self.directory)
        aside = self.directory / REPLACED
        aside.mkdir()
        # While `REPLACED` has a marker, the files beside it belong to the new run: the marker is
        # moved last here, moved first in `_move_earlier_files_back`, and deleted last in
        # `delete_replaced_files`.
        for path in (*written, self.directory / MARKER):
            path.rename(aside / path.name)

    def _keep_new_or_restore_old_run(self) -> bool:
        """Keep the new run if it has a result; otherwise restore the replaced run.

        Returns:
            Whether the new run has a result.
        """
        aside = self.directory / REPLACED
        if aside.exists() and not written_by_toolkit(aside):  # killed while it moved the files
            self._move_earlier_files_back()
            return False
        new = [
            path
            for path in entries_written_by_toolkit(self.directory)
            if path.name not in self._earlier_names
        ]
        ignored_names = DESCRIPTIONS | BEFORE_FIRST_STEP if aside.exists() else DESCRIPTIONS
        if self._logs_are_kept and not aside.exists():
            return True
        if any(_has_result(path, ignored_names) for path in new):
            self.delete_replaced_files()
            return True
        evidence = self.directory / HALTED_FOLDER  # `rlhf replay` needs it after an alarm at step 1
        for path in new:
            if path != evidence or not aside.exists():
                remove(path)
        if aside.exists():
            if evidence.exists():
                remove(aside / HALTED_FOLDER)
            self._move_earlier_files_back()
        return False

    def _move_earlier_files_back(self) -> None:
        """Move the files of the earlier run back from `REPLACED`, the marker first."""
        aside = self.directory / REPLACED
        for path in _entries_sorted_by_marker(aside, marker_first=True):
            path.replace(self.directory / path.name)
        aside.rmdir()


@contextlib.contextmanager
def convert_write_errors_to_user_errors(directory: Path) -> Iterator[None]:
    """Return a context manager that converts an OSError to a UserError.

    The message says that the directory cannot be written, and why.
    """
    try:
        yield
    except OSError as error:
        reason = describe_write_error(error)
        raise UserError(f"{directory} cannot be written: {reason}") from error


def path_without_dot_dot(directory: str | Path) -> Path:
    """Return the absolute path of a path that contains ``..``; return other paths unchanged.

    The operating system cannot use a path with ``..`` if a parent directory does not exist yet.
    """
    path = Path(directory)
    return path.resolve() if ".." in path.parts else path


def check_new_directory(directory: Path) -> None:
    """Check that a directory can be created.

    Raises:
        UserError: It is a file or is not empty, or its path is not valid, contains a link to a
            missing folder, or is inside a folder of another run.
    """
    check_output_path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already: choose another --output_dir")


def written_by_toolkit(directory: Path) -> bool:
    """Return whether a command of the toolkit created a directory."""
    return (directory / MARKER).is_file()


def check_output_path(directory: Path, *, option: str = "--output_dir") -> None:
    """Check that an output directory has a valid path outside the folders that other runs replace.

    For example, a run in ``checkpoints/step-9`` of another run is deleted with the other run's old
    checkpoints. Folders of `CONTAINERS` are allowed, because studies write their runs there.

    Args:
        directory: The directory, which need not exist.
        option: Name of the option or configuration key that sets the directory.

    Raises:
        UserError: The path is not valid, begins with ``~``, is inside a folder of another run, or
            contains a link to a folder that does not exist, or has the name of a temporary folder.
    """
    if (expanded := expand_user(directory)) != directory:  # the folder would have the name ~
        raise UserError(f"{option.lstrip('-')}: write {expanded} instead of {directory}")
    if "\0" in str(directory) or len(os.fsencode(directory.name)) > MAX_NAME_BYTES:
        raise UserError(
            f"{option.lstrip('-')}: a name has at most {MAX_NAME_BYTES} bytes and no null "
            f"character, but the name begins with {directory.name[:50]!r}: choose another {option}"
        )
    target = Path(os.path.realpath(directory))
    temporary = [
        name
        for name in target.parts
        # A branch is first written to a temporary folder of this process.
        if is_temporary_name(name) and not is_temporary_name_of_this_process(name)
    ]
    if temporary:
        raise UserError(
            f"{option.lstrip('-')}: {temporary[0]!r} is the name of a temporary folder, which is "
            f"removed: choose another {option}"
        )
    with convert_write_errors_to_user_errors(directory):
        for run in target.parents:
            name = target.relative_to(run).parts[0]
            if name in _REPLACED_FOLDERS and written_by_toolkit(run):
                raise UserError(
                    f"{directory} is inside the folder {name} of the run {run}, which replaces the "
                    f"content of this folder: choose another {option}"
                )
    for part in (directory, *directory.parents):
        if part.is_symlink() and not part.exists():
            raise UserError(
                f"{part} is a symbolic link to {os.readlink(part)}, which does not exist: create "
                f"that folder, remove the link, or choose another {option}"
            )


def check_writable(directory: Path) -> None:
    """Check without any change that an output directory can be written or created.

    Raises:
        UserError: The directory cannot be written or created, or `check_output_path` rejects it.
    """
    check_output_path(directory)
    with convert_write_errors_to_user_errors(directory):
        place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if not place.is_dir():
            raise UserError(f"{place} is a file: choose another --output_dir")
        if not os.access(place, os.W_OK | os.X_OK):
            is_read_only = os.statvfs(place).f_flag & os.ST_RDONLY
            number = errno.EROFS if is_read_only else errno.EACCES
            raise OSError(number, os.strerror(number), str(place))


def _check_replaceable(directory: Path, inputs: Iterable[Path]) -> None:
    """Raise UserError if ``--overwrite`` must not replace the content of a directory."""
    if not any(written_by_toolkit(d) for d in (directory, directory / REPLACED)):
        raise UserError(
            f"{directory} is not a run directory (it has no file {MARKER}), so it is not "
            "overwritten: remove it yourself or choose another --output_dir"
        )
    target = directory.resolve()
    if place := working_or_home_directory_within(directory):
        raise UserError(
            f"{directory} is not overwritten, because it is or contains the {place}: choose "
            "another --output_dir"
        )
    for path in inputs:
        if path.resolve().is_relative_to(target):
            raise UserError(
                f"{directory} is not overwritten, because this command reads {path} in it: choose "
                "another --output_dir"
            )


def working_or_home_directory_within(directory: Path) -> str:
    """Return "working directory" or "home directory" if a directory is or contains it, else ""."""
    target = directory.resolve()
    places = {"working directory": Path.cwd(), "home directory": expand_user("~")}
    return next((n for n, place in places.items() if place.resolve().is_relative_to(target)), "")


def _entries_except_locks(directory: Path) -> list[Path]:
    """Return the files and folders in a directory, except `LOCK_FILES`."""
    return [path for path in directory.iterdir() if path.name not in LOCK_FILES]


def _entries_sorted_by_marker(directory: Path, *, marker_first: bool) -> list[Path]:
    """Return the content of a directory, with the marker at the start or at the end."""
    return sorted(directory.iterdir(), key=lambda path: (path.name != MARKER) == marker_first)


def _declared_entries(directory: Path) -> list[str]:
    """Return the names that earlier runs in a directory declared."""
    try:
        entries = read_json(directory / MARKER)["entries"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in entries if isinstance(name, str)] if isinstance(entries, list) else []


def entries_written_by_toolkit(directory: Path) -> list[Path]:
    """Return the files and folders in a run directory that the command of this run wrote.

    The stages of a pipeline are included. Other runs inside a run directory are not.
    """
    names = {*_names_written_by(_recorded_command(directory)), *_declared_entries(directory)}
    stages = _stage_names(directory)
    return [
        path
        for path in _entries_except_locks(directory)
        if path.name in names or (path.name in stages and written_by_toolkit(path))
    ]


def _stage_names(directory: Path) -> set[str]:
    """Return the names of the stages of the pipeline that wrote a directory."""
    with contextlib.suppress(UserError):  # a damaged pipeline.yaml
        stages = read_mapping_or_empty(directory / "pipeline.yaml").get("stages")
        if isinstance(stages, list):
            return {str(stage.get("name")) for stage in stages if isinstance(stage, dict)}
    return set()


def _names_written_by(command: str) -> frozenset[str]:
    """Return the names of `DESCRIPTIONS` and `RESULTS` that a command may write."""
    others = {name for names in ONLY_WRITTEN_BY.values() for name in names}
    others -= set(ONLY_WRITTEN_BY.get(command, ()))
    return (DESCRIPTIONS | RESULTS) - others - NOT_WRITTEN_BY.get(command, frozenset())


def foreign_file_error(path: Path, directory: Path) -> UserError:
    """Return the error for a file of the user in a folder that would be replaced."""
    return UserError(
        f"{path} was not written by the toolkit, so {directory} is not overwritten: move the file "
        "away, or choose another --output_dir"
    )


def _recorded_command(directory: Path) -> str:
    """Return the command that wrote a directory, or "" if the directory has no description."""
    with contextlib.suppress(UserError):  # a damaged config.yaml
        config = read_mapping_or_empty(directory / "config.yaml")
        if config:
            return str(config.get("command") or config.get("verb"))
    return next(
        (
            COMMAND_BY_DESCRIPTION[name]
            for name in COMMAND_BY_DESCRIPTION
            if (directory / name).is_file()
        ),
        "",
    )


def files_not_written_by_toolkit(path: Path) -> Iterator[Path]:
    """Yield the files that the toolkit did not write, inside a path that the toolkit wrote.

    Raises:
        DamagedFolderError: The checksum file of a folder in the path cannot be read.
    """
    if path.is_symlink() or not path.is_dir():
        return
    if written_by_toolkit(path):
        written = entries_written_by_toolkit(path)
        yield from (child for child in _entries_except_locks(path) if child not in written)
        for child in written:
            yield from files_not_written_by_toolkit(child)
    elif path.name in CONTAINERS:
        yield from _foreign_files_in_container(path)
    elif pattern := WRITTEN_FILE_PATTERNS.get(path.name):
        files = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
        names = {
            file: file.relative_to(path).as_posix() for file in files if not is_partial_path(file)
        }
        yield from (file for file, name in names.items() if not re.fullmatch(pattern, name))
        for folder in sorted({file.parent for file in names if file.name == CHECKSUMS_FILE}):
            yield from files_without_checksum(folder)
    else:  # the final model, or a checkpoint
        yield from files_without_checksum(path)


def remove_written_files(path: Path) -> None:
    """Remove what the toolkit wrote at a path; a file of the user stays, with its folders.

    The checksums beside such a file stay too, because they show that the toolkit did not write it.
    If a checksum file cannot be read, everything is removed.
    """
    try:
        foreign = set(files_not_written_by_toolkit(path))
    except DamagedFolderError:  # nothing shows which files the toolkit wrote
        foreign = set()
    if not foreign:
        remove(path)
        return
    paths_to_keep = foreign | {
        folder / CHECKSUMS_FILE for file in foreign for folder in file.parents
    }
    for entry in sorted(path.rglob("*"), reverse=True):  # the content of a folder precedes it
        if entry.is_symlink() or not entry.is_dir():
            if entry not in paths_to_keep:
                entry.unlink()
        elif not any(entry.iterdir()):
            entry.rmdir()


def _foreign_files_in_container(folder: Path) -> Iterator[Path]:
    """Yield the files that the toolkit did not write, inside a folder of run directories."""
    for path in folder.iterdir():
        if path.is_dir() and not written_by_toolkit(path):
            yield from _foreign_files_in_container(path)
        elif path.is_dir():
            yield from files_not_written_by_toolkit(path)
        elif not re.fullmatch(r"(held-out|pairs-\d+)\.jsonl", path.name):
            yield path


def _first_missing_file_for_resume(directory: Path, required: Sequence[str]) -> str | None:
    """Return the first required file that a directory lacks, or None if it can be resumed.

    A directory without content can be resumed, because its run was killed before it wrote a file.
    A directory with a folder of run directories can be resumed too, because the jobs of
    ``rlhf bench --array`` write nothing else.
    """
    entries = [e for e in _entries_except_locks(directory) if not is_partial_path(e)]
    if not any(_has_content(e) for e in entries) or any(_contains_only_runs(e) for e in entries):
        return None
    folders = (directory, directory / REPLACED)
    return next((name for name in required if not any((f / name).exists() for f in folders)), None)


def _contains_only_runs(path: Path) -> bool:
    """Return whether a path is a folder of run directories, without files of other programs."""
    return (
        path.name in CONTAINERS
        and any(path.rglob(MARKER))
        and not any(_foreign_files_in_container(path))
    )


def _has_result(path: Path, ignored_names: Container[str]) -> bool:
    """Return whether a path has content that is a result, that is, not named in ``ignored_names``.

    In a run directory, and in a folder of run directories, the entries of the run directories are
    examined.
    """
    if path.name in CONTAINERS:
        return any(_has_result(marker.parent, ignored_names) for marker in path.rglob(MARKER))
    if path.is_dir() and written_by_toolkit(path):
        return any(_has_result(entry, ignored_names) for entry in entries_written_by_toolkit(path))
    return path.name not in ignored_names and _has_content(path)


def _has_content(path: Path) -> bool:
    """Return whether a path is a file, a symbolic link, or a folder that is not empty."""
    return path.is_symlink() or not path.is_dir() or any(path.iterdir())


def _writer_text(directory: Path) -> str:
    """Return a text with the id and the host of the process that writes to a directory."""
    try:
        writer = read_json(directory / MARKER)["writer"]
        return f"process {writer['pid']} on {writer['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
