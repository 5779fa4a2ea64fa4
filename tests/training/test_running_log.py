"""The compact log of a run in training has the same series as the rows of its metrics."""

import math
import random
import tracemalloc
from typing import Any

import pytest

from rlhf.runs.diagnostics import metric_warnings
from rlhf.runs.metric_log import CHECKED_KEYS, MetricLog, RunningMetricLog


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with missing, infinite and nan values of checked and other metrics."""
    rng = random.Random(seed)
    keys = (*CHECKED_KEYS, "eval/judge", "reward/env", "other")
    values = (math.nan, math.inf, True, None, "text", 3)

    def value() -> object:
        return rng.gauss(0, 40) if rng.random() < 0.9 else rng.choice(values)

    return [
        {"step": step // 2, "rewards/unscored/judge/timeout": rng.random()}
        | {key: value() for key in keys if rng.random() < 0.8}
        for step in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_series_and_warnings_are_those_of_the_rows(seed: int) -> None:
    logged = rows(60, seed)
    config = {"gold": [{"kind": "function", "name": "judge"}]}
    compact = RunningMetricLog(config, logged[:20])
    for row in logged[20:]:
        compact.add(row)
    whole = MetricLog(config=config, metrics=logged)
    for key in (*CHECKED_KEYS, "eval/judge", "reward/env"):
        assert compact.series(key) == whole.series(key)
    assert compact.first_not_finite_steps() == whole.first_not_finite_steps()
    assert list(metric_warnings(compact, "now")) == list(metric_warnings(whole, "now"))


def test_memory_grows_by_less_than_a_tenth_of_the_rows() -> None:
    log = RunningMetricLog({}, ())
    tracemalloc.start()
    for step in range(2000):
        log.add({"step": step} | {f"metric/{i}": step + i / 50 for i in range(50)})
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 350 * 2000  # a row of 50 new numbers needs 3,500 bytes
