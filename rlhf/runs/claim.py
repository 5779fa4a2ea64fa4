"""Lock output directories: one process at a time writes to a directory of the toolkit.

A directory of the toolkit contains the file ``.rlhf``. ``--overwrite`` moves the files of an
earlier run to ``.replaced``, and restores them if the new run ends without a result. Files that no
command writes are not moved.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf.common.files import describe_write_error, is_partial, remove, repair_folder, write_text
from rlhf.errors import UserError
from rlhf.runs.checksums import unlisted_files

MARKER = ".rlhf"
"""File that marks a directory of the toolkit; it contains the id of the process that writes."""
LOCK = ".lock"
REPLACED = ".replaced"
LOCK_FILES = frozenset({MARKER, LOCK, REPLACED})

DESCRIPTIONS = frozenset(
    [
        "bench.yaml",
        "config.yaml",
        "environment.json",
        "inputs.json",
        "logs",
        "pipeline.yaml",
        "tune.yaml",
    ]
)
"""Entries that exist before a command has a result."""
RESULTS = frozenset(
    [
        "bench.json",
        "bench.md",
        "checkpoints",
        "evaluation",
        "final",
        "finished",
        "halted",
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
"""Other entries that a command writes."""
CONTAINERS = frozenset({"runs", "trials", "proxies", "rl"})
"""Folders of the directories of runs."""


class Claim:
    """A lock of this process on an output directory, from ``open`` to ``close``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = FileLock(directory / LOCK)
        self._existed = directory.exists()
        self._was_marked = False
        # Entries that existed before this process.
        self._earlier: frozenset[str] = frozenset()

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        resume: bool,
        overwrite: bool,
        description: str | None = None,
        inputs: Iterable[Path] = (),
    ) -> Claim:
        """Create and lock a directory, or lock one that an earlier command wrote.

        Args:
            directory: The directory.
            resume: Whether an existing directory may be continued.
            overwrite: Whether the files of an earlier command may be replaced.
            description: File that a directory needs to be resumed, such as config.yaml.
            inputs: Files and folders that the command reads; none may be replaced.

        Raises:
            UserError: The directory exists and may not be used, another process writes it, or it
                cannot be written.
        """
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory} is a file: choose another --output_dir")
        if directory.exists() and _entries(directory):
            if overwrite:
                _refuse_replacement(directory, inputs)
            elif not resume:
                raise UserError(
                    f"{directory} exists already: continue it with --resume, replace it with "
                    "--overwrite, or choose another --output_dir"
                )
            elif description and not _can_resume(directory, description):
                raise UserError(f"{directory} has no {description}, so there is nothing to resume")
        claim = cls(directory)
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            claim._acquire()
            try:
                claim._enter(overwrite=overwrite)
            except BaseException:
                claim.close()
                raise
        return claim

    def declare(self, names: Iterable[str]) -> None:
        """Record further entries that this run will write; `RESULTS` contains the usual ones."""
        writer = {"pid": os.getpid(), "host": platform.node()}
        marker = {"writer": writer, "entries": sorted({*_declared(self.directory), *names})}
        write_text(self.directory / MARKER, json.dumps(marker))

    def commit(self) -> None:
        """Delete the replaced files; call this when the run has its first result."""
        if (self.directory / REPLACED).exists():
            shutil.rmtree(self.directory / REPLACED)

    def close(self) -> None:
        """Release the directory; after a run without a result, its old content is restored."""
        if not self._lock.is_locked:
            return
        moved = not self.directory.exists()
        has_result = moved or self._settle()
        self._lock.release()
        if not has_result and not self._was_marked:
            for name in (MARKER, LOCK):
                (self.directory / name).unlink(missing_ok=True)
            if not self._existed:
                self.directory.rmdir()

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.directory} is in use by {_writer(self.directory)}: wait until it ends, or "
                "choose another --output_dir"
            ) from None

    def _enter(self, *, overwrite: bool) -> None:
        repair_folder(self.directory)
        if (self.directory / REPLACED).exists():  # the process that moved the files was killed
            self._settle()
        self._was_marked = written_by_toolkit(self.directory)
        self._earlier = frozenset(path.name for path in _entries(self.directory))
        if overwrite and self._earlier:
            self._set_aside()
            self._earlier = frozenset(path.name for path in _entries(self.directory))
        self.declare(())

    def _set_aside(self) -> None:
        """Move the files of an earlier run to `REPLACED`."""
        written = written_entries(self.directory)
        for path in written:
            if foreign := next(_foreign_files(path), None):
                raise UserError(
                    f"{foreign} was not written by a run, so {self.directory} is not overwritten: "
                    "move the file away, or choose another --output_dir"
                )
        aside = self.directory / REPLACED
        aside.mkdir()
        for path in (*written, self.directory / MARKER):
            path.rename(aside / path.name)

    def _settle(self) -> bool:
        """Keep the new run if it has a result; otherwise restore the replaced run.

        Returns:
            Whether the new run has a result.
        """
        new = [path for path in written_entries(self.directory) if path.name not in self._earlier]
        if any(path.name not in DESCRIPTIONS and _has_content(path) for path in new):
            self.commit()
            return True
        for path in new:
            remove(path)
        aside = self.directory / REPLACED
        if aside.exists():
            for path in aside.iterdir():
                path.replace(self.directory / path.name)
            aside.rmdir()
        return False


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Raise an OSError in this block as a UserError: the directory cannot be written."""
    try:
        yield
    except OSError as error:
        reason = describe_write_error(error)
        raise UserError(f"{directory} cannot be written: {reason}") from error


def locate(directory: str | Path) -> Path:
    """Return the path of a directory without ``..``, even if its parents do not exist yet."""
    path = Path(directory)
    return path.resolve() if ".." in path.parts else path


def written_by_toolkit(directory: Path) -> bool:
    """Return whether a command of the toolkit made a directory."""
    return (directory / MARKER).is_file()


def _refuse_replacement(directory: Path, inputs: Iterable[Path]) -> None:
    """Raise UserError for a directory that must not be replaced."""
    if not any(written_by_toolkit(d) for d in (directory, directory / REPLACED)):
        raise UserError(
            f"{directory} is not a run directory (it has no file {MARKER}), so it is not "
            "overwritten: remove it yourself or choose another --output_dir"
        )
    target = directory.resolve()
    for name, place in (("working directory", Path.cwd()), ("home directory", Path.home())):
        if place.resolve().is_relative_to(target):
            raise UserError(
                f"{directory} contains the {name}, so it is not overwritten: choose another "
                "--output_dir"
            )
    for path in inputs:
        if path.resolve().is_relative_to(target):
            raise UserError(
                f"{directory} contains {path}, which this command reads, so it is not overwritten: "
                "choose another --output_dir"
            )


def _entries(directory: Path) -> list[Path]:
    """Return the entries of a directory without those of `Claim` itself."""
    return [path for path in directory.iterdir() if path.name not in LOCK_FILES]


def _declared(directory: Path) -> list[str]:
    """Return the entries that earlier runs in a directory declared."""
    try:
        return json.loads((directory / MARKER).read_text())["entries"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def written_entries(directory: Path) -> list[Path]:
    """Return the entries of a marked directory that the toolkit wrote."""
    names = {*DESCRIPTIONS, *RESULTS, *_declared(directory)}
    return [path for path in _entries(directory) if path.name in names or written_by_toolkit(path)]


def _foreign_files(path: Path) -> Iterator[Path]:
    """Yield the files in an entry of the toolkit that the toolkit did not write."""
    if path.is_symlink() or not path.is_dir():
        return
    if path.name == "final":
        yield from unlisted_files(path)
    elif written_by_toolkit(path):
        written = written_entries(path)
        yield from (child for child in _entries(path) if child not in written)
        for child in written:
            yield from _foreign_files(child)
    elif path.name in CONTAINERS:
        yield from _foreign_in_container(path)


def _foreign_in_container(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and not written_by_toolkit(path):
            yield from _foreign_in_container(path)
        elif path.is_dir():
            yield from _foreign_files(path)
        elif path.suffix != ".jsonl":
            yield path


def _can_resume(directory: Path, description: str) -> bool:
    """Return whether a run is described, or was killed before it wrote anything else."""
    if any((folder / description).exists() for folder in (directory, directory / REPLACED)):
        return True
    return not any(_has_content(e) and not is_partial(e) for e in _entries(directory))


def _has_content(path: Path) -> bool:
    """Return whether a path is a file, a link, or a folder that is not empty."""
    return path.is_symlink() or not path.is_dir() or any(path.iterdir())


def _writer(directory: Path) -> str:
    """Describe the process that holds the lock of a directory."""
    try:
        writer = json.loads((directory / MARKER).read_text())["writer"]
        return f"process {writer['pid']} on {writer['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
