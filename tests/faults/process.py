"""Run `rlhf` in forked processes while the file system has a fault.

    python -m tests.faults.process FAULT FOLDER MODEL SEED COUNT

Imports torch once. An undisturbed run comes first. Then COUNT runs start under the fault, at a
place drawn from SEED; each is resumed without the fault and must end with the same bits.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from rlhf.cli.main import main
from rlhf.common.files import read_log
from tests.helpers.training import assert_same_run, online_tree

STEPS = 4
Fault = Callable[[], object]


def rlhf(*arguments: str, fault: Fault | None = None) -> tuple[int, str]:
    """Run a command in a forked process; return its exit code and standard error."""
    receive, send = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(send, 2)
        os.close(receive)
        sys.stderr = os.fdopen(2, "w", closefd=False)  # pytest replaces it and the log handlers
        logging.getLogger().handlers.clear()
        code = 99
        try:
            if fault:
                fault()
            code = main(arguments)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(send)
    with os.fdopen(receive, errors="replace") as stream:
        errors = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), errors


def configuration(run: Path, model: Path) -> Path:
    """Write the configuration of a run beside its directory; return the file."""
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(online_tree(run, model, num_steps=STEPS)))
    return path


def check_failure(run: Path, code: int, errors: str, words: str) -> None:
    """Check that a run ended with one line about its fault, and that its logs can be read."""
    assert code == 2, (code, errors)
    lines = [line for line in errors.splitlines() if line.startswith("rlhf: ")]
    assert len(lines) == 1, errors
    assert words in lines[0], lines
    assert "Traceback" not in errors, errors
    steps = [row["step"] for row in read_log(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    read_log(run / "samples.jsonl")


def fail_writes(folder: Path, first: int, counter: Path | None = None) -> None:
    """Let every opening of a file for writing below a folder fail, from the given one on."""
    seen = 0

    def check(event: str, values: tuple) -> None:
        nonlocal seen
        if event != "open" or not isinstance(values[1], str) or not set(values[1]) & set("wax+"):
            return
        if str(values[0]).startswith(str(folder)):
            seen += 1
            if counter:
                os.truncate(counter, seen)  # its size is the number of openings
            if seen >= first:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(values[0]))

    sys.addaudithook(check)


def limit_file_size(size: int) -> None:
    """Let writes beyond a file size fail."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def drop_capabilities() -> None:
    """Give up the right of the superuser to write where the permissions forbid it (Linux)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0


class Faults:
    """Faults in a folder; each method sets up one run, and returns (fault, repair, words)."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.whole = folder / "whole"
        counter = folder / "openings"
        counter.touch()
        count = partial(fail_writes, self.whole, sys.maxsize, counter)
        code, errors = rlhf("ppo", "--config", str(configuration(self.whole, model)), fault=count)
        assert code == 0, errors
        self.openings = counter.stat().st_size
        self.files = [path.stat().st_size for path in self.whole.rglob("*") if path.is_file()]

    def openings_fail(self, run: Path, rng: random.Random) -> tuple[Fault, Fault, str]:
        first = rng.randint(1, self.openings)
        print("opening", first, "of", self.openings)
        return partial(fail_writes, run, first), lambda: None, "the disk is full; free space"

    def file_size(self, run: Path, rng: random.Random) -> tuple[Fault, Fault, str]:
        size = rng.randrange(100, max(self.files))
        print("limit", size, "of", max(self.files))
        return partial(limit_file_size, size), lambda: None, "raise it (ulimit -f)"

    def full_disk(self, run: Path, rng: random.Random) -> tuple[Fault, Fault, str]:
        """Leave a random number of bytes free on a small file system (in a user namespace)."""
        used = sum(self.files)
        free = rng.randrange(used)
        print("free", free, "of", used)
        mount(run.parent, f"size={free // 4096 * 4096 or 4096}")
        repair = partial(mount, run.parent, f"remount,size={4 * used}")
        return lambda: None, repair, "the disk is full; free space"

    def read_only(self, run: Path, rng: random.Random) -> tuple[Fault, Fault, str]:
        mount(run.parent, "ro")
        return (
            lambda: None,
            partial(mount, run.parent, "remount,rw"),
            "the file system is read-only",
        )

    def unwritable(self, run: Path, rng: random.Random) -> tuple[Fault, Fault, str]:
        run.parent.chmod(0o555)
        return drop_capabilities, partial(run.parent.chmod, 0o755), "permission denied"


def mount(folder: Path, options: str) -> None:
    """Mount a file system in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


def run_faults(kind: str, folder: Path, model: Path, *, seed: int, count: int) -> None:
    """Run under ``count`` faults of one kind; resume each run without the fault."""
    rng = random.Random(seed)
    faults = Faults(folder, model)
    hits = 0
    for number in range(count):
        (folder / f"{number}").mkdir()
        run = folder / f"{number}/run"
        config = configuration(folder / f"{number}-run", model)
        command = ("ppo", "--config", str(config), "--output_dir", str(run), "--resume")
        fault, repair, words = getattr(faults, kind)(run, rng)
        code, errors = rlhf(*command, fault=fault)
        repair()
        if code:
            check_failure(run, code, errors, words)
            hits += 1
        code, errors = rlhf(*command)
        assert code == 0, errors
        assert_same_run(faults.whole, run)
    print(f"{kind}: {hits} of {count} runs failed; all ended like the undisturbed run")
    assert hits


if __name__ == "__main__":
    run_faults(
        sys.argv[1],
        Path(sys.argv[2]),
        Path(sys.argv[3]),
        seed=int(sys.argv[4]),
        count=int(sys.argv[5]),
    )
