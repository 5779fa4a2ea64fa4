"""The run directory: configuration, environment, logs, checkpoints and results.

    config.yaml  inputs.json  environment.json  metrics.jsonl  samples.jsonl  checkpoints/  final/
    evaluation/<name>/{summary.json, episodes.jsonl}  report.html

An existing directory is overwritten only with --overwrite; a run can be resumed only with the same
configuration.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from rlhf.common.files import (
    append_text,
    json_line,
    read_log,
    write_text,
)
from rlhf.common.yaml_text import dump_yaml, read_yaml_or_json
from rlhf.errors import UserError
from rlhf.runs.claim import Claim, locate, writing
from rlhf.runs.inputs import fingerprints, input_paths, leaves
from rlhf.runs.machine import describe_machine
from rlhf.runs.renamed import current_config
from rlhf.runs.trackers import (
    Tracker,
    check_installed,
    close_trackers,
    log_to,
    open_trackers,
)

# Keys about the directory of a run; config.yaml does not contain them.
DIRECTORY_KEYS = frozenset({"resume", "overwrite", "output_dir"})
# Keys that may differ between a run and its resumption.
KEYS_FREE_ON_RESUME = DIRECTORY_KEYS | {"track", "alarms"}


class Run:
    """Writes a run directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started = time.monotonic()
        # If there are several processes, only the first one writes.
        self.writes = os.environ.get("RANK", "0") == "0"
        self.config: Mapping[str, Any] = {}
        self.trackers: dict[str, Tracker] | None = None
        self._claim: Claim | None = None

    @classmethod
    def open(cls, config: Mapping[str, Any]) -> Run:
        """Create, resume or overwrite the directory of a run, as its configuration states.

        Raises:
            UserError: The directory exists, is in use, cannot be written, or has another
                configuration or other inputs.
        """
        run = cls(locate(config["output_dir"]))
        run.config = config
        check_installed(config.get("track", ()))
        if not run.writes:
            return run
        resume, overwrite = bool(config.get("resume")), bool(config.get("overwrite"))
        inputs = input_paths(config).values()
        run._claim = Claim.open(
            run.directory,
            resume=resume,
            overwrite=overwrite,
            description="config.yaml",
            inputs=inputs,
        )
        try:
            run._describe(resume=resume and not overwrite)
        except BaseException:
            run.close()
            raise
        return run

    def _describe(self, *, resume: bool) -> None:
        """Write the description of a new run, or compare it with that of the resumed run."""
        if resume and (self.directory / "config.yaml").exists():
            check_same(self.directory, self.config)
        kept = {key: value for key, value in self.config.items() if key not in DIRECTORY_KEYS}
        with writing(self.directory):
            (self.directory / "checkpoints").mkdir(exist_ok=True)
            write_text(self.directory / "config.yaml", dump_yaml(kept))
            write_text(self.directory / "inputs.json", json.dumps(fingerprints(kept), indent=2))
            machine = json.dumps(describe_machine(), indent=2)
            write_text(self.directory / "environment.json", machine)

    @property
    def final(self) -> Path:
        """Folder of the trained model."""
        return self.directory / "final"

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.directory / "finished").exists()

    def declare(self, names: Iterable[str]) -> None:
        """Record further entries of the directory that the run will write."""
        if self._claim is not None:
            self._claim.declare(names)

    def finish(self) -> None:
        """Mark the run as complete; ``--resume`` then has nothing to do."""
        if self.writes:
            (self.directory / "finished").touch()
        close_trackers(self.trackers or {})
        self.trackers = None

    def close(self) -> None:
        """Give the directory up; a run without a result leaves it as it was before."""
        if self._claim is not None:
            self._claim.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl``; keys are documented in docs/metrics.md."""
        row = {"step": step, "time": round(time.monotonic() - self.started, 3), **metrics}
        self._append("metrics.jsonl", row)
        if not self.writes or not self.config.get("track"):
            return
        if self.trackers is None:
            flat = flatten(self.config)
            self.trackers = open_trackers(self.config["track"], self.directory, flat, step=step)
        self.trackers = log_to(self.trackers, step, metrics)

    def sample(self, row: Mapping[str, Any]) -> None:
        """Append one transcript to ``samples.jsonl``."""
        self._append("samples.jsonl", row)

    def rewind(self, step: int) -> None:
        """Remove all log rows after ``step``, so that a resumed run does not log them twice.

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
        append_text(self.directory / name, json_line(row))
        if self._claim is not None:
            self._claim.commit()


def check_same(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError if a run would be resumed with another configuration or changed inputs.

    An input may have another path, as in a directory that was moved, if its content is the same.

    Raises:
        UserError: The message names a key that changed.
    """
    recorded = current_config(read_yaml_or_json(directory / "config.yaml"))
    inputs, current = _recorded_inputs(directory), fingerprints(config)
    before, now = dict(leaves(recorded)), dict(leaves(config))
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if key.split(".")[0] not in KEYS_FREE_ON_RESUME and before.get(key) != now.get(key)
    ]
    changed = [key for key in changed if key not in current or current[key] != inputs.get(key)]
    if changed:
        key = changed[0]
        was, is_now = (shorten(repr(tree.get(key)), 100, placeholder="…") for tree in (before, now))
        raise UserError(
            f"{directory} cannot be resumed with another configuration: {key} was {was}, now "
            f"{is_now}" + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
        )
    for key, fingerprint in inputs.items():
        if current.get(key, fingerprint) != fingerprint:
            raise UserError(
                f"{directory} cannot be resumed: the content of {key} ({now[key]}) has changed "
                "since the run started; restore it, or start anew with --overwrite"
            )


def _recorded_inputs(directory: Path) -> dict[str, str]:
    path = directory / "inputs.json"
    return read_yaml_or_json(path) if path.exists() else {}


@contextlib.contextmanager
def open_directory(
    root: Path, name: str, tree: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[Claim]:
    """Claim the directory of a pipeline or a study, and describe it in a YAML file ``name``.

    Raises:
        UserError: The directory exists and may not be used, or it cannot be written.
    """
    inputs = input_paths(tree).values()
    claim = Claim.open(locate(root), resume=resume, overwrite=overwrite, inputs=inputs)
    try:
        with writing(root):
            write_text(root / name, dump_yaml(dict(tree)))
        yield claim
    finally:
        claim.close()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as a flat one: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
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
