"""Settings of a process before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.common.launcher import launcher_number
from rlhf.errors import UserError
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


@pytest.mark.parametrize(
    ("variable", "value", "number"),
    [
        ("WORLD_SIZE", None, 1),
        ("WORLD_SIZE", "8", 8),
        ("LOCAL_WORLD_SIZE", None, 1),
        ("RANK", None, 0),
        ("RANK", "0", 0),
        ("LOCAL_RANK", "3", 3),
    ],
)
def test_numbers_of_a_launcher(variable, value, number, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    if value is not None:
        monkeypatch.setenv(variable, value)
    assert launcher_number(variable) == number


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "eight"),
        ("WORLD_SIZE", ""),
        ("LOCAL_WORLD_SIZE", "-1"),
        ("RANK", "first"),
        ("RANK", "-1"),
        ("LOCAL_RANK", "1.5"),
    ],
)
def test_a_launcher_variable_that_is_no_number_is_refused(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable} is {value!r}: set it to a whole number from"):
        launcher_number(variable)


def test_a_wrong_launcher_variable_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "first")
    assert main(["envs", "list"]) == 2
    expected = "rlhf: RANK is 'first': set it to a whole number from 0, or unset it"
    assert capsys.readouterr().err.strip() == expected
