"""Settings of a process before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.runs.launch import SPIN_COUNT

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys
from rlhf.runs.launch import prepare_process
prepare_process()
assert "torch" not in sys.modules
print(json.dumps([os.environ.get(n) for n in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")]))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [str(SPIN_COUNT), None]),
        ({"GOMP_SPINCOUNT": "7"}, ["7", None]),
        ({"OMP_WAIT_POLICY": "active"}, [None, "active"]),
    ],
)
def test_waiting_threads_sleep_soon_unless_the_user_decides(given, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    variables = {n: v for n, v in os.environ.items() if n not in names} | given
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == expected
