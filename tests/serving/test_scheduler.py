"""The thread of the engine: what it submits together, cancellation, idle time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from rlhf.rollout.sampling.base import SamplingParams
from rlhf.rollout.sampling.continuous import ContinuousEngine
from rlhf.serving import scheduler as scheduler_module
from rlhf.serving.engine_thread import EngineThread
from rlhf.serving.scheduler import Job, Progress, Scheduler
from tests.helpers.models import tiny_model


class LoggedEngine(ContinuousEngine):
    """An engine that notes the sizes of what it receives, and its polls as 0."""

    def __init__(self, rows: int) -> None:
        super().__init__(tiny_model()[0], max_rows=rows, open_ended=True)
        self.log: list[int] = []

    def submit(self, requests: Any) -> None:
        self.log.append(len(requests))
        super().submit(requests)

    def poll(self) -> Any:
        self.log.append(0)
        return super().poll()


def job(deliver: Callable[[Progress], None], *, prompt: int = 8, limit: int = 5) -> Job:
    return Job.with_new_episode(
        list(range(5, 5 + prompt)),
        SamplingParams(),
        max_new_tokens=limit,
        seed=(1, prompt, limit),
        num_alternatives=0,
        incremental=True,
        deliver=deliver,
    )


@contextlib.asynccontextmanager
async def scheduling(rows: int = 4) -> AsyncIterator[tuple[Scheduler, LoggedEngine]]:
    engine = LoggedEngine(rows)
    scheduler = Scheduler(engine, max_running=rows, max_waiting=100)
    try:
        yield scheduler, engine
    finally:
        scheduler.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):  # only ends a test that would wait for ever
        while not condition():
            await asyncio.sleep(0.005)


def test_prompts_are_submitted_together_up_to_a_number_of_tokens(monkeypatch):
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 20)

    async def run() -> list[int]:
        async with scheduling(rows=8) as (scheduler, engine):
            scheduler.submit([job(lambda p: None) for _ in range(5)])
            scheduler.submit([job(lambda p: None, prompt=50)])  # alone it exceeds the number
            await until(lambda: scheduler.num_unfinished == 0)
            return [size for size in engine.log if size]

    assert asyncio.run(run()) == [2, 2, 1, 1]


def test_a_single_new_request_waits_for_a_few_polls_only():
    async def run() -> list[int]:
        async with scheduling(rows=20) as (scheduler, engine):
            started = asyncio.Event()
            scheduler.submit([job(lambda p: started.set(), limit=200) for _ in range(17)])
            await started.wait()
            scheduler.submit([job(lambda p: None)])
            await until(lambda: 1 in engine.log)
            return list(engine.log)

    log = asyncio.run(run())
    assert log[0] == 17
    assert log.index(1) < 200


def test_progress_is_the_whole_completion_in_order():
    async def run() -> None:
        parts: dict[str, list[Progress]] = {"a": [], "b": []}
        async with scheduling(rows=1) as (scheduler, _):
            scheduler.submit([job(parts["a"].append), job(parts["b"].append, prompt=3)])
            await until(lambda: scheduler.num_unfinished == 0)
        for progress in parts.values():
            assert [p.is_last for p in progress] == [False] * (len(progress) - 1) + [True]
            assert sum(len(p.new_tokens.tokens) for p in progress) <= 5
            assert len(progress) > 1
            assert sum(len(p.new_tokens.logprobs) for p in progress) == sum(
                len(p.new_tokens.tokens) for p in progress
            )

    asyncio.run(run())


@pytest.mark.parametrize("index", [0, 1])
def test_a_canceled_job_is_not_continued(index):
    async def run() -> None:
        delivered: list[Job] = []
        async with scheduling(rows=1) as (scheduler, engine):
            jobs = [job(lambda p: delivered.append(p.job), limit=150) for _ in range(2)]
            scheduler.submit(jobs)
            scheduler.cancel(jobs[index])
            scheduler.cancel(jobs[index])
            assert scheduler.num_unfinished == 1
            await until(lambda: scheduler.num_unfinished == 0)
            assert set(delivered) == {jobs[1 - index]}
            assert engine._sampler is not None
            assert engine._sampler.row_of == {}

    asyncio.run(run())


def test_the_cache_is_freed_without_requests(monkeypatch):
    monkeypatch.setattr(scheduler_module, "IDLE_SECONDS", 0.05)

    async def run() -> None:
        async with scheduling() as (scheduler, engine):
            for _ in range(2):
                scheduler.submit([job(lambda p: None)])
                await until(lambda: scheduler.num_unfinished == 0)
                await until(lambda: engine._sampler is None)

    asyncio.run(run())


def test_a_function_runs_in_the_thread_of_the_engine():
    async def run() -> None:
        async with scheduling() as (scheduler, _):
            assert await scheduler.call_in_engine_thread(lambda: 1 + 1) == 2
            with pytest.raises(ZeroDivisionError):
                await scheduler.call_in_engine_thread(lambda: 1 / 0)

    asyncio.run(run())


def test_the_engine_runs_in_the_thread_that_loaded_the_model() -> None:
    thread = EngineThread()
    engine = thread.call(lambda: LoggedEngine(2))
    loaded_in = thread.call(threading.current_thread)
    scheduler = Scheduler(engine, max_running=2, max_waiting=1, thread=thread)
    assert asyncio.run(scheduler.call_in_engine_thread(threading.current_thread)) is loaded_in
    scheduler.close()
    with pytest.raises(ZeroDivisionError):
        EngineThread().call(lambda: 1 // 0)
