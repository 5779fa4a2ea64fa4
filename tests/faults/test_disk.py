"""A run on a full, limited, read-only or unwritable disk ends in one line and can be resumed."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
"""A user may mount file systems in a namespace of his own."""

KINDS = {"openings_fail": 3, "file_size": 2, "full_disk": 3, "read_only": 1, "unwritable": 1}
"""Fault -> number of runs in the default tests."""


def can_mount(folder):
    mount = ["mount", "-t", "tmpfs", "none", str(folder)]
    return bool(shutil.which("unshare")) and not subprocess.run([*NAMESPACE, *mount]).returncode


def run_faults(kind, count, folder, model):
    seed = random.randrange(10**6)
    print("seed", seed)
    prefix = ()
    if kind in ("full_disk", "read_only"):
        if not can_mount(folder):
            pytest.skip("no file system can be mounted here")
        prefix = NAMESPACE
    program = [sys.executable, "-m", "tests.faults.process", kind, str(folder), str(model)]
    process = subprocess.run(
        [*prefix, *program, str(seed), str(count)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    print(process.stdout)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_continues_after_a_fault(kind, tmp_path, echo_model):
    run_faults(kind, KINDS[kind], tmp_path, echo_model)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["openings_fail", "file_size", "full_disk"])
def test_twenty_random_faults(kind, tmp_path, echo_model):
    run_faults(kind, 20, tmp_path, echo_model)
