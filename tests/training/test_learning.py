"""PPO and GRPO reach the known optimum of solved tasks; all seeds: benchmarks/learning.py."""

from __future__ import annotations

import pytest

from benchmarks.learning import ALGORITHMS, REQUIRED_FRACTION, TASKS, run_task


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", [TASKS[0], *(pytest.param(task, marks=pytest.mark.sweep) for task in TASKS[1:])]
)
def test_the_optimum_is_reached(tmp_path, task: str) -> None:
    found = run_task(task, tmp_path, seed=0)
    for algorithm in ALGORITHMS:
        assert found[algorithm]["share"] >= REQUIRED_FRACTION
        # Not because imitation was there already: most of what it lacked is gained.
        before = found["sft"]["normalized"]["mean"]
        assert found[algorithm]["normalized"]["low"] > before
