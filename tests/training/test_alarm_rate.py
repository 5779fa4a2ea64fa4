"""The rate of false alarms in the 100 healthy runs of `benchmarks.alarm_rate`.

The whole: ``python -m pytest -m sweep tests/training/test_alarm_rate.py -s``, about eight minutes;
``--draw TEXT/N`` selects about one run in N.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.alarm_rate import MAX_ALARMS, HealthyRun, alarm_table, alarms_of, healthy_runs

Alarms = dict[HealthyRun, list[str]]


@pytest.fixture(scope="module")
def alarms() -> Iterator[Alarms]:
    """Collect the alarms of every run; print their rates at the end, and check them."""
    found: Alarms = {}
    yield found
    print("\n" + alarm_table(found))
    assert sum(map(bool, found.values())) <= MAX_ALARMS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and initial models are shared by the runs of a task and a seed."""
    return tmp_path_factory.mktemp("healthy")


@pytest.mark.sweep
@pytest.mark.parametrize("run", healthy_runs(), ids=lambda run: run.name)
def test_healthy_runs_have_at_most_five_alarms(
    run: HealthyRun, folder: Path, alarms: Alarms
) -> None:
    alarms[run] = alarms_of(run, folder)


def test_the_list_has_100_different_runs() -> None:
    assert len(set(healthy_runs())) == 100
    assert not set(healthy_runs()) & set(healthy_runs(100))


def test_a_healthy_run_has_no_alarm(tmp_path: Path) -> None:
    assert alarms_of(HealthyRun("sft", "echo", 0), tmp_path) == []


def test_the_summary_has_exact_intervals() -> None:
    """0 of 4: the upper end is 1 - 0.025 ** (1 / 4)."""
    runs = healthy_runs()[:4]
    lines = alarm_table({run: [] for run in runs}).splitlines()
    assert lines[-1] == "| any | 0 of 4 | 0.0% to 60.2% |"
    table = alarm_table({run: ["invalid"] if run == runs[0] else [] for run in runs})
    assert "| invalid | 1 of 4 |" in table
    assert table.splitlines()[-1] == f"{runs[0].name}: invalid"
