"""The run directory: configuration, environment, logs, checkpoints and results.

    config.yaml  environment.json  metrics.jsonl  samples.jsonl  checkpoints/  final/
    evaluation/<name>/{summary.json, episodes.jsonl}  report.html

An existing directory is overwritten only with --overwrite; a resumed one must have the same
configuration.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from rlhf.common.files import json_line, read_log, write_text
from rlhf.errors import UserError
from rlhf.runs.renamed import current_config
from rlhf.runs.trackers import Tracker, check_installed, open_trackers

# Keys about the directory of a run; config.yaml does not contain them.
PLACES = frozenset({"resume", "overwrite", "output_dir"})
# Keys that may differ between a run and its resumption.
RESUMABLE = PLACES | {"track"}


class Run:
    """Writes one run directory; a run that is ``finished`` needs no more work."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started = time.monotonic()
        # Only the first of several processes writes.
        self.writes = os.environ.get("RANK", "0") == "0"
        self.config: Mapping[str, Any] = {}
        self.trackers: list[Tracker] | None = None
        # The run that this one overwrites, until this one has a result.
        self._replaced: Path | None = None

    @classmethod
    def open(cls, config: Mapping[str, Any]) -> Run:
        """Create, resume or overwrite the directory of a run, as its configuration states.

        Raises:
            UserError: The directory exists, cannot be written, or has another configuration.
        """
        run = cls(Path(config["output_dir"]))
        run.config = config
        check_installed(config.get("track", ()))
        if not run.writes:
            return run
        if run.directory.exists() and not run.directory.is_dir():
            raise UserError(f"{run.directory} is a file: choose another --output_dir")
        occupied = run.directory.exists() and any(run.directory.iterdir())
        if occupied and config.get("overwrite"):
            run._set_aside()
        elif occupied and not config.get("resume"):
            raise _occupied(run.directory)
        elif occupied:
            check_same(run.directory, config)
        try:
            (run.directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            kept = {key: value for key, value in config.items() if key not in PLACES}
            write_text(run.directory / "config.yaml", yaml.safe_dump(kept, sort_keys=False))
            write_text(run.directory / "environment.json", json.dumps(describe_machine(), indent=2))
        except OSError as error:
            raise UserError(f"{run.directory} cannot be written: {error.strerror}") from error
        return run

    def _set_aside(self) -> None:
        """Rename the old run; `discard_if_unused` restores it while this run has no result."""
        if not (self.directory / "config.yaml").exists():
            raise UserError(
                f"{self.directory} is not a run directory (it has no config.yaml), so it is not "
                "overwritten: remove it yourself or choose another --output_dir"
            )
        directory = self.directory.resolve()
        self._replaced = directory.with_name(f".{directory.name}.replaced")
        shutil.rmtree(self._replaced, ignore_errors=True)
        directory.rename(self._replaced)

    def _remove_replaced(self) -> None:
        if self._replaced is not None:
            shutil.rmtree(self._replaced)
            self._replaced = None

    @property
    def final(self) -> Path:
        """Folder of the trained model."""
        return self.directory / "final"

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.directory / "finished").exists()

    def finish(self) -> None:
        """Mark the run as complete; ``--resume`` then has nothing to do."""
        if self.writes:
            (self.directory / "finished").touch()
            self._remove_replaced()
        for tracker in self.trackers or ():
            tracker.close()

    def discard_if_unused(self) -> None:
        """Remove a directory without results and restore the run that it would have replaced."""
        kept = {"config.yaml", "environment.json"}
        paths = self.directory.iterdir()
        written = {path.name for path in paths if path.is_file() or any(path.iterdir())}
        if not self.writes or not written <= kept:
            return
        shutil.rmtree(self.directory)
        if self._replaced is not None:
            self._replaced.rename(self.directory)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl``; keys are documented in docs/metrics.md."""
        row = {"step": step, "time": round(time.monotonic() - self.started, 3), **metrics}
        self._append("metrics.jsonl", row)
        if not self.writes or not self.config.get("track"):
            return
        if self.trackers is None:
            flat = flatten(self.config)
            self.trackers = open_trackers(self.config["track"], self.directory, flat, step=step)
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def sample(self, row: Mapping[str, Any]) -> None:
        """Append one transcript to ``samples.jsonl``."""
        self._append("samples.jsonl", row)

    def rewind(self, step: int) -> None:
        """Remove what was logged after ``step``, so that a resumed run logs nothing twice.

        Transcripts of the trained policy follow the last step and are written again.
        """
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.directory / name
            if self.writes and path.exists():
                rows = read_log(path)
                kept = [r for r in rows if r["step"] <= step and r.get("split") != "after"]
                write_text(path, "".join(json_line(row) for row in kept))

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        self._remove_replaced()
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(json_line(row))


def check_same(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse to resume a run with another configuration.

    Raises:
        UserError: The message names a key that changed.
    """
    path = directory / "config.yaml"
    if not path.exists():
        raise UserError(f"{directory} has no config.yaml, so there is nothing to resume")
    recorded = current_config(yaml.safe_load(path.read_text()))
    before, now = flatten(recorded), flatten(config)
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if key.split(".")[0] not in RESUMABLE and before.get(key) != now.get(key)
    ]
    if changed:
        key = changed[0]
        was, is_now = (shorten(repr(tree.get(key)), 100, placeholder="…") for tree in (before, now))
        raise UserError(
            f"{directory} cannot be resumed with another configuration: {key} was {was}, now "
            f"{is_now}" + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
        )


def open_directory(
    root: Path, name: str, tree: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> None:
    """Create the directory of a pipeline or a study, with a YAML file ``name`` that describes it.

    A directory without that file is never overwritten.

    Raises:
        UserError: The directory exists and may not be used, or it cannot be written.
    """
    if root.exists() and any(root.iterdir()):
        if overwrite and (root / name).exists():
            shutil.rmtree(root)
        elif overwrite:
            raise UserError(f"{root} was not made by this command: remove it yourself")
        elif not resume:
            raise _occupied(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_text(root / name, yaml.safe_dump(dict(tree), sort_keys=False))
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror}") from error


def _occupied(directory: Path) -> UserError:
    return UserError(
        f"{directory} exists already: continue it with --resume, replace it with --overwrite, or "
        "choose another --output_dir"
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys: ``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def seed_everything(seed: int) -> None:
    """Seed the generators that library code draws from: Python, numpy, torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def describe_machine() -> dict[str, Any]:
    """Return versions, hardware and command line, for ``environment.json``."""
    from importlib.metadata import PackageNotFoundError, version

    packages = ("rlhf-kit", "torch", "transformers", "trl", "peft", "gymnasium", "datasets")
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that was never installed
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions,
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    """Return the name of the processor and its bf16 instructions, which decide the speed."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name", platform.processor())
    units = [
        unit for unit in ("amx_bf16", "avx512_bf16") if unit in fields.get("flags", "").split()
    ]
    return f"{name} ({units[0]})" if units else name


def _commit() -> str | None:
    """Return the commit of the toolkit's own checkout; None for an installed package."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None
