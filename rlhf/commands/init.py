"""Implements `rlhf init`, which writes a commented project that uses the plug-in mechanism."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf.common.files import write_text
from rlhf.common.names import did_you_mean
from rlhf.errors import UserError

_TEMPLATES = Path(__file__).with_name("templates")
_SUFFIX = ".txt"
"""Suffix of the files of a template, which are text in the package and not modules of it."""

_HIDDEN = "dot-"
"""Prefix that becomes a dot in the project; patterns of package data do not match hidden files."""

TEMPLATES = {
    "project": "a pipeline with an environment, reward and algorithm of your own, and a CI gate",
    "python": "a Python script with your own data, reward and callback",
}
"""Name -> description."""
_FIRST_COMMAND = {"project": "rlhf run pipeline.yaml", "python": "python train.py"}


@dataclass(frozen=True)
class InitConfig:
    """Configuration of `rlhf init`."""

    template: str = "project"
    """Template: project (a pipeline with an environment, a reward and an algorithm of your own, and
    a CI gate) or python (a script)."""
    directory: str = "."
    """Folder of the project. Existing files are not replaced."""

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            known = ", ".join(f"{name} ({text})" for name, text in TEMPLATES.items())
            hint = did_you_mean(self.template, TEMPLATES) or f"; the templates are {known}"
            raise UserError(f"init: there is no template {self.template!r}{hint}")


def init(config: InitConfig) -> Iterator[str]:
    """Write the files of a template; yield their paths and the first command.

    Raises:
        UserError: A file exists already, or is below a path that is no folder.
    """
    root, target = _TEMPLATES / config.template, Path(config.directory)
    files = {
        path: target.joinpath(*map(_name_in_project, path.relative_to(root).parts))
        for path in sorted(root.rglob(f"*{_SUFFIX}"))
    }
    for file in files.values():
        if os.path.lexists(file):
            raise UserError(f"init: {file} exists already: choose another --directory")
        above = next(folder for folder in file.parents if os.path.lexists(folder))
        if not above.is_dir():
            raise UserError(f"init: {above} is not a folder: choose another --directory")
    _write_all_or_none({file: source.read_text(encoding="utf-8") for source, file in files.items()})
    yield from map(str, files.values())
    folder = "" if target == Path() else f"cd {shlex.quote(str(target))} && "
    yield f"start with: {folder}{_FIRST_COMMAND[config.template]}"


def _write_all_or_none(texts: Mapping[Path, str]) -> None:
    """Write new files; if this fails, remove them again, so that the command can be repeated."""
    folders = {folder for file in texts for folder in file.parents if not folder.exists()}
    try:
        for file, text in texts.items():
            write_text(file, text)
    except BaseException:
        for file in texts:
            file.unlink(missing_ok=True)
        for folder in sorted(folders, reverse=True):  # subfolders first
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _name_in_project(name: str) -> str:
    """Return the name in the project of a file or folder of a template."""
    if name.startswith(_HIDDEN):
        name = f".{name.removeprefix(_HIDDEN)}"
    return name.removesuffix(_SUFFIX)
