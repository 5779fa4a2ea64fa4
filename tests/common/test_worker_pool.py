"""Worker processes: order of results, errors, and the end of the processes."""

import gc
import os
import time

import pytest

from rlhf.common.worker_pool import WorkerPool
from rlhf.errors import UserError

HERE = "tests.common.test_worker_pool"


def make_adder(offset):
    return lambda number: number + offset


def make_failing():
    def fail(task):
        if task == "user":
            raise UserError("wrong row")
        if task == "exit":
            os._exit(3)
        raise KeyError(task)

    return fail


def make_sleeper():
    def sleep(seconds):
        time.sleep(seconds)
        return os.getpid()

    return sleep


def make_garbage_settings():
    return lambda task: (gc.get_threshold()[0], gc.get_freeze_count() > 0)


def test_only_workers_collect_garbage_rarely():
    before = gc.get_threshold()
    with WorkerPool(2, f"{HERE}:make_garbage_settings", ()) as pool:
        assert set(pool.map(range(4))) == {(100_000, True)}
    with WorkerPool(1, f"{HERE}:make_garbage_settings", ()) as pool:
        assert [threshold for threshold, _ in pool.map([0])] == [before[0]]
    assert gc.get_threshold() == before


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_results_have_the_order_of_the_tasks(count):
    with WorkerPool(count, f"{HERE}:make_adder", (10,)) as pool:
        assert list(pool.map(iter(range(30)))) == list(range(10, 40))
        assert list(pool.map([1])) == [11]
        assert list(pool.map([])) == []


def test_several_processes_work():
    with WorkerPool(2, f"{HERE}:make_sleeper", ()) as pool:
        processes = set(pool.map([0.05] * 8))
    assert len(processes) == 2
    assert os.getpid() not in processes


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("user", UserError, "^wrong row$"),
        ("exit", UserError, "ended with exit code 3.*data_processes"),
        ("other", RuntimeError, "KeyError: 'other'"),
    ],
)
def test_errors_reach_the_caller(task, kind, message):
    with (
        WorkerPool(2, f"{HERE}:make_failing", ()) as pool,
        pytest.raises(kind, match=message),
    ):
        list(pool.map([task]))


def test_no_process_is_left_after_an_interruption():
    pool = WorkerPool(2, f"{HERE}:make_sleeper", ())
    with pytest.raises(KeyboardInterrupt), pool:
        interrupt(pool)
    for process in SEEN:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert len(SEEN) == 2


SEEN: set[int] = set()


def interrupt(pool):
    """Interrupt this process while tasks of a minute are in progress."""
    SEEN.update(pool.map([0.05] * 6))
    results = pool.map(iter([0.0] * 5 + [60.0] * 3))
    next(results)
    raise KeyboardInterrupt
