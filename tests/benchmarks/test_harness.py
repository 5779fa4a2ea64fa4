"""The harness with sides that take no time. Its processes look workloads up by name, so the table
of a child is extended through a module that stands before it on the path.
"""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import MeasurementOptions, run_workload
from benchmarks.summary import TimedStep as OwnStep
from benchmarks.workloads import WORKLOADS, Side, Workload
from rlhf.errors import UserError
from tests.helpers.benchmark_sides import WORK

STEPS: list[str] = []
PLAN = MeasurementOptions(warmup=1, rounds=3, quiet=99.0, patience=0.0, model="any")

STARTER = """
import sys
from benchmarks.workloads import WORKLOADS, Side, Workload
from tests.helpers.benchmark_sides import WORK
sides = {n: Side(n, "tests.helpers.benchmark_sides:count", {"work": w}) for n, w in WORK.items()}
WORKLOADS["counting"] = Workload("c", "u", sides, prepare="tests.helpers.benchmark_sides:prepare")
failing = {"ours": Side("ours", "tests.helpers.benchmark_sides:fail")}
WORKLOADS["failing"] = Workload("f", "u", failing)
from benchmarks.worker import main
main(*sys.argv[1:])
"""


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    starter = tmp_path / "starter.py"
    starter.write_text(STARTER)
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nshift 2\nPYTHONPATH=. exec {sys.executable} {starter} "$@"\n')
    wrapper.chmod(0o755)
    sides = {n: Side(n, "", {"work": w}) for n, w in WORK.items()}
    monkeypatch.setitem(WORKLOADS, "counting", Workload("c", "u", sides, prepare="yes"))
    monkeypatch.setitem(WORKLOADS, "failing", Workload("f", "u", {"ours": Side("ours", "")}))
    monkeypatch.setattr(harness, "ensure_venv_python", lambda venv: str(wrapper))
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "benchmarks" / "work"


def test_sides_step_in_turn_forwards_and_backwards(table: Path):
    result = run_workload("counting", PLAN)
    assert (table / "counting/order.txt").read_text() == "123321123321"
    assert (table / "counting/prepared").read_text() == "any"
    side = result["sides"]["second"]
    assert side["kept"] == 3  # the warm-up is not counted
    assert side["work"] == 2.0
    assert list(result["ratios"]) == ["second", "third"]
    json.dumps(result)


def test_the_reason_of_a_side_that_fails_is_told(table: Path):
    with pytest.raises(UserError, match="failing ours exited early: RuntimeError: no such trainer"):
        run_workload("failing", PLAN)


def test_a_side_that_does_not_exist_is_refused(table: Path):
    with pytest.raises(UserError, match=r"no side 'secnd'.*second"):
        run_workload("counting", MeasurementOptions(sides=("secnd",)))


def test_another_checkout_takes_the_place_of_the_other_sides(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "other"
    package = other / "benchmarks"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "worker.py").write_text(
        "import json, sys\n"
        "print(json.dumps({'ready': True}), flush=True)\n"
        "for _ in sys.stdin:\n"
        "    row = {'seconds': 0.5, 'work': 1.0, 'others': 0.0, 'peak_gib': 1.0}\n"
        "    print(json.dumps(row | {'name': sys.argv[2]}), flush=True)\n"
    )
    monkeypatch.setattr(harness, "ROOT", other)
    monkeypatch.setattr(harness, "ensure_venv_python", lambda venv: sys.executable)
    monkeypatch.setattr(
        harness, "TimedStep", lambda name, **row: STEPS.append(name) or OwnStep(**row)
    )
    STEPS.clear()
    monkeypatch.setitem(
        WORKLOADS, "pair", Workload("p", "u", {"ours": Side("ours", ""), "trl": Side("trl", "")})
    )
    result = run_workload(
        "pair", MeasurementOptions(warmup=0, rounds=6, patience=0.0, against=other)
    )
    assert list(result["sides"]) == ["ours", "before"]
    assert result["sides"]["before"]["label"] == "ours, before"
    assert set(STEPS) == {"ours"}  # the name of the side in either table
    assert result["ratios"]["before"]["speed"] == 1.0
