"""Environments that run in threads: concurrency, order, failures and time limits."""

import re
import sqlite3
import sys
import threading
from functools import partial
from typing import Any

import pytest

from rlhf.config.rollout import EnvSpec
from rlhf.errors import UserError
from rlhf.rollout.env_calls import make_env_factory
from rlhf.rollout.env_workers import LockstepWorkers, ThreadedWorkers, workers_for
from tests.helpers.models import tiny_model
from tests.helpers.rollouts import FakeEngine, Tales, collect_one, episode_seeds, make_collector
from tests.rollout.test_env_calls import GOOD, STEPS, tale_with

WAIT = 60.0
"""Time limit of a wait that a correct program ends at once, in seconds."""


def threaded(engine: Any, make: Any = Tales, **spec: Any) -> Any:
    return make_collector(engine, make, workers=ThreadedWorkers, **spec)


def test_environments_step_at_the_same_time() -> None:
    barrier = threading.Barrier(4)

    def meet(env: Any, action: str) -> Any:
        barrier.wait(WAIT)
        return GOOD

    playing = threaded(FakeEngine("go"), tale_with(meet), parallel=4)
    assert [rollout.seed for rollout in playing.collect(episode_seeds(*range(8)))] == [*range(8)]
    playing.close()


class CountingEngine(FakeEngine):
    """Completes one request per poll, and sets an event after a number of polls."""

    def __init__(self, *replies: str, polls: int) -> None:
        super().__init__(*replies)
        self.remaining, self.done = polls, threading.Event()

    def poll(self) -> Any:
        self.remaining -= 1
        if self.remaining <= 0:
            self.done.set()
        first, self.requests = self.requests[:1], self.requests[1:]
        return [self.complete(request) for request in first]


def test_other_episodes_are_sampled_while_an_environment_waits() -> None:
    engine = CountingEngine("go", polls=6)

    def wait_for_polls(env: Any, action: str) -> Any:
        assert env.seed != 0 or engine.done.wait(WAIT)
        return GOOD

    class Seeded(tale_with(wait_for_polls)):
        def reset(self, *, seed=None, options=None):
            self.seed = seed
            return super().reset(seed=seed)

    playing = threaded(engine, Seeded, parallel=2)
    # The first episode ends last, and its rollout is still the first.
    assert [rollout.seed for rollout in playing.collect(episode_seeds(*range(6)))] == [*range(6)]
    playing.close()


@pytest.mark.parametrize("seed", range(3))
def test_rollouts_do_not_depend_on_the_workers(seed: int) -> None:
    model, _ = tiny_model(seed=seed)
    seeds = episode_seeds(*range(10 * seed, 10 * seed + 6))
    found = []
    for workers in (LockstepWorkers, ThreadedWorkers):
        playing = make_collector(model, workers=workers, parallel=3, max_new_tokens=5)
        found.append(playing.collect(seeds))
        playing.close()
    for one, other in zip(*found, strict=True):
        assert one.seed == other.seed
        assert one.tokens == other.tokens
        assert one.env_rewards == other.env_rewards
        assert one.conversation == other.conversation
        sampled = [a for a, b in zip(one.logprobs, other.logprobs, strict=True) if a is not None]
        assert sampled
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("kind", STEPS)
def test_a_failure_stops_the_run_with_its_reason_and_seed(kind: str) -> None:
    step, reason = STEPS[kind]
    playing = threaded(FakeEngine("go"), tale_with(step), timeout=0.05)
    with pytest.raises(UserError, match=rf"episode of seed 41: .*{reason}"):
        playing.collect(episode_seeds(41))


@pytest.mark.parametrize("kind", STEPS)
def test_a_failure_is_counted_and_the_other_episodes_go_on(kind: str) -> None:
    step, _ = STEPS[kind]

    class Seeded(tale_with(lambda env, action: step(env, action) if env.seed == 1 else GOOD)):
        def reset(self, *, seed=None, options=None):
            self.seed = seed
            return super().reset(seed=seed)

    playing = threaded(FakeEngine("go"), Seeded, errors="count", timeout=0.05, parallel=2)
    assert [rollout.seed for rollout in playing.collect(episode_seeds(0, 1, 2))] == [0, 2]
    assert playing.workers.calls.failures.total() == 1
    assert [rollout.seed for rollout in playing.collect(episode_seeds(3, 4))] == [3, 4]
    playing.close()


def test_an_error_discards_busy_environments_and_keeps_the_others() -> None:
    release = threading.Event()

    def step(env: Any, action: str) -> Any:
        if env.seed == 0:
            release.wait(WAIT)
        if env.seed == 1:
            raise ValueError("broken")
        return GOOD

    class Seeded(tale_with(step)):
        def reset(self, *, seed=None, options=None):
            self.seed = seed
            return super().reset(seed=seed)

    playing = threaded(FakeEngine("go"), Seeded, parallel=2)
    with pytest.raises(UserError, match="episode of seed 1: ValueError: broken"):
        playing.collect(episode_seeds(0, 1))
    assert len(playing.envs) == 1
    assert [rollout.seed for rollout in playing.collect(episode_seeds(2, 3))] == [2, 3]
    release.set()
    playing.close()


def test_an_environment_is_called_by_the_thread_that_made_it() -> None:
    closed = threading.Event()

    class Database(Tales):
        """SQLite objects raise an error in every thread but their own."""

        def __init__(self) -> None:
            super().__init__()
            self.rows = sqlite3.connect(":memory:")

        def reset(self, **options: Any) -> Any:
            self.rows.execute("create table if not exists moves (move text)")
            return super().reset(**options)

        def step(self, action: str) -> Any:
            self.rows.execute("insert into moves values (?)", [action])
            return super().step(action)

        def close(self) -> None:
            self.rows.close()
            closed.set()

    playing = threaded(FakeEngine("go"), Database, parallel=2)
    assert len(playing.collect(episode_seeds(0, 1, 2))) == 3
    playing.close()
    assert closed.is_set()


def test_output_of_threads_is_not_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    def chatty(env: Any, action: str) -> Any:
        print("a move")
        return GOOD

    playing = threaded(FakeEngine("go"), tale_with(chatty))
    playing.collect(episode_seeds(0))
    playing.close()
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "a move\n")


def test_an_environment_that_cannot_be_made_is_an_error_of_the_caller() -> None:
    def make() -> Any:
        sys.exit(3)

    with pytest.raises(RuntimeError, match=r"called sys.exit\(3\)"):
        collect_one(FakeEngine("go"), make, workers=ThreadedWorkers)


def isolated(engine: Any, task: str, **spec: Any) -> Any:
    """A collector whose environments run in processes."""
    make = make_env_factory(EnvSpec(id=f"{PROCESS_TASKS}:{task}"))
    return make_collector(engine, make, workers=partial(ThreadedWorkers, isolated=True), **spec)


PROCESS_TASKS = "tests.helpers.process_envs"


def test_environments_in_processes_give_the_same_episodes() -> None:
    spec = EnvSpec(id="text/GuessNumber-v0")
    found = []
    for workers in (LockstepWorkers, partial(ThreadedWorkers, isolated=True)):
        playing = make_collector(
            FakeEngine("50", "25", "10"), make_env_factory(spec), workers=workers, parallel=2
        )
        found.append(playing.collect(episode_seeds(0, 1, 2)))
        assert playing.max_sampled_tokens_per_episode() > 0
        playing.close()
    for one, other in zip(*found, strict=True):
        assert vars(one) == vars(other)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("end", "RuntimeError: the process of the environment ended with exit code 7"),
        ("raise", "ValueError: broken"),
        ("unpicklable", "cannot pickle|Can't pickle|can't pickle"),
        ("hang", "TimeoutError: took longer than 5 s"),
    ],
)
def test_a_process_that_fails_costs_only_its_episode(kind: str, reason: str) -> None:
    playing = isolated(FakeEngine(kind, "go"), "Faulty-v0", errors="count", timeout=5.0)
    assert playing.collect(episode_seeds(0), allow_empty=True) == []
    ((found, count),) = playing.workers.calls.failures.items()
    assert re.search(reason, found)
    assert count == 1
    playing.close()


@pytest.mark.parametrize(
    ("env_id", "concurrency", "expected"),
    [
        ("text/Echo-v0", "auto", LockstepWorkers),
        ("rlhf.envs:text/ReasoningGym-v0", "auto", LockstepWorkers),
        ("FrozenLake-v1", "auto", ThreadedWorkers),
        ("text/Unknown-v0", "auto", ThreadedWorkers),
        ("FrozenLake-v1", "lockstep", LockstepWorkers),
        ("text/Echo-v0", "threads", ThreadedWorkers),
        ("text/Echo-v0", "processes", ThreadedWorkers),
    ],
)
def test_workers_of_a_configuration(env_id: str, concurrency: Any, expected: type) -> None:
    workers = workers_for(EnvSpec(id=env_id, concurrency=concurrency))
    assert type(workers) is expected
    assert getattr(workers, "isolated", False) == (concurrency == "processes")


def test_an_environment_that_cannot_be_made_in_a_process_is_one_line() -> None:
    make = make_env_factory(EnvSpec(id="text/Echo-v0", kwargs={"colour": 3}))
    workers = partial(ThreadedWorkers, isolated=True)
    with pytest.raises(UserError, match=r"env\.id 'text/Echo-v0' cannot be made: .*colour"):
        collect_one(FakeEngine("go"), make, workers=workers)
