"""Environments that run in threads: concurrency, order, failures and time limits."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.rollout import EnvSpec
from rlhf.errors import UserError
from rlhf.rollout.environments.calls import EnvironmentCaller, make_env_factory
from rlhf.rollout.environments.process import ProcessEnvironment
from rlhf.rollout.environments.workers import LockstepWorkers, ThreadedWorkers, workers_for
from tests.helpers.faulty_steps import GOOD, STEPS, tale_with
from tests.helpers.models import tiny_model
from tests.helpers.rollouts import FakeEngine, Tales, collect_one, episode_seeds, make_collector

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
    assert playing.workers.caller.failures.total() == 1
    assert [rollout.seed for rollout in playing.collect(episode_seeds(3, 4))] == [3, 4]
    playing.close()


def test_an_error_discards_busy_environments_and_keeps_the_others() -> None:
    busy, release = threading.Event(), threading.Event()

    def step(env: Any, action: str) -> Any:
        if env.seed == 0:
            busy.set()
            release.wait(WAIT)
        if env.seed == 1:
            assert busy.wait(WAIT)
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


@pytest.mark.parametrize(
    ("call", "words"),
    [(sys.exit, r"called sys.exit\(0\)"), (os._exit, r"called sys.exit\(0\)")],
)
def test_a_task_that_ends_the_process_when_it_is_made_in_a_thread_is_one_line(
    call: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gymnasium.make", lambda *_, **__: getattr(*call_name(call))(0))
    workers = ThreadedWorkers(EnvironmentCaller())
    with pytest.raises(UserError, match=rf"env\.id 'Any-v0' cannot be made: {words}"):
        workers.make(make_env_factory(EnvSpec(id="Any-v0")))


def call_name(call: Any) -> tuple[Any, str]:
    """Module and name, because the function of the module is replaced while environments run."""
    return (sys, "exit") if call is sys.exit else (os, "_exit")


def test_the_creation_of_an_environment_has_the_time_limit_of_calls() -> None:
    release = threading.Event()
    workers = ThreadedWorkers(EnvironmentCaller(timeout=0.05))
    with pytest.raises(UserError, match=r"env\.id.* cannot be made: took longer than 0.05 s"):
        workers.make(lambda: Tales(closed=release.wait(WAIT)))
    release.set()


def test_creation_and_close_write_no_result_and_do_not_end_the_process(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Loud(Tales):
        def __init__(self) -> None:
            super().__init__()
            print("made")

        def close(self) -> None:
            print("closed")
            os._exit(0)

    playing = threaded(FakeEngine("stop"), Loud)
    playing.collect(episode_seeds(0))
    playing.close()
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "made\nclosed\n")
    assert "could not be closed: called sys.exit(0)" in caplog.text


def test_the_state_of_the_process_is_restored_after_a_collection(tmp_path: Path) -> None:
    def wander(env: Any, action: str) -> Any:
        os.chdir(tmp_path)
        sys.stderr = None  # pyright: ignore
        return GOOD

    before = os.getcwd(), sys.stderr
    playing = threaded(FakeEngine("go"), tale_with(wander))
    playing.collect(episode_seeds(0, 1))
    found = os.getcwd(), sys.stderr
    os.chdir(before[0])
    sys.stderr = before[1]
    assert found == before
    playing.close()


def test_a_call_that_returns_late_fails_although_the_engine_was_busy() -> None:
    late = threading.Event()

    class Busy(FakeEngine):
        """Samples until the late call has returned."""

        def poll(self) -> Any:
            if self.turns:
                assert late.wait(WAIT)
                time.sleep(0.1)
            return super().poll()

    class Slow(Tales):
        def reset(self, *, seed=None, options=None):
            self.seed = seed
            if seed == 1:
                time.sleep(0.2)
                late.set()
            return super().reset(seed=seed)

    playing = threaded(Busy("go", "stop"), Slow, errors="count", timeout=0.1, parallel=2)
    assert [rollout.seed for rollout in playing.collect(episode_seeds(0, 1))] == [0]
    playing.close()


def test_an_environment_whose_call_returns_after_the_limit_is_closed() -> None:
    release, closed = threading.Event(), threading.Event()

    class Slow(tale_with(lambda env, action: (release.wait(WAIT), GOOD)[1])):
        def close(self) -> None:
            closed.set()

    playing = threaded(FakeEngine("go"), Slow, errors="count", timeout=0.05)
    assert playing.collect(episode_seeds(0), allow_empty=True) == []
    assert not closed.is_set()
    release.set()
    assert closed.wait(WAIT)


def test_busy_environments_are_discarded_although_the_engine_cannot_be_reset() -> None:
    release = threading.Event()

    class Broken(FakeEngine):
        def poll(self) -> Any:
            raise ConnectionError("no server")

        def reset(self) -> None:
            raise ConnectionError("no server")

    class Slow(Tales):
        def reset(self, *, seed=None, options=None):
            assert seed == 0 or release.wait(WAIT)
            return super().reset(seed=seed)

    playing = threaded(Broken("go"), Slow, parallel=2)
    with pytest.raises(ConnectionError):
        playing.collect(episode_seeds(0, 1))
    assert (len(playing.envs), playing.workers.num_undelivered_calls) == (1, 0)
    release.set()
    playing.close()


def isolated(engine: Any, task: str, *, kwargs: Any = None, **spec: Any) -> Any:
    """A collector whose environments run in processes."""
    make = make_env_factory(EnvSpec(id=f"{PROCESS_TASKS}:{task}", kwargs=kwargs or {}))
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
    ((found, count),) = playing.workers.caller.failures.items()
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


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("end", "the process of the environment ended with exit code -9"),
        ("unpicklable", "cannot pickle|Can't pickle|can't pickle"),
        ("hang", "took longer than 2 s"),
    ],
)
def test_a_process_that_cannot_make_its_environment_is_one_line(
    kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rlhf.rollout.environments.process.START_SECONDS", 20.0 if kind != "hang" else 0.0
    )
    playing = isolated(FakeEngine("go"), "Refused-v0", kwargs={"kind": kind}, timeout=2.0)
    with pytest.raises(UserError, match=rf"env\.id: .*cannot be made: .*{reason}"):
        playing.collect(episode_seeds(0))


def test_actions_that_are_not_supported_are_one_line_in_a_process() -> None:
    playing = isolated(FakeEngine("go"), "NoTextActions-v0")
    with pytest.raises(UserError, match=r"NoTextActions.* has the action space Box"):
        playing.collect(episode_seeds(0))
    playing.close()


def test_signals_that_stop_a_run_do_not_end_its_environments() -> None:
    env: Any = ProcessEnvironment(make_env_factory(EnvSpec(id=f"{PROCESS_TASKS}:Faulty-v0")))
    env.reset(seed=0)
    process = int(env.step("pid")[0])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(process, number)
    # A program that the environment starts is still stopped by SIGTERM.
    assert env.step("child")[0] == str(-signal.SIGTERM)
    assert int(env.step("pid")[0]) == process
    env.close()


def test_a_process_ends_with_its_run_although_its_environment_is_busy() -> None:
    program = f"""if __name__ == "__main__":
    import os
    from rlhf.config.rollout import EnvSpec
    from rlhf.rollout.environments.calls import make_env_factory
    from rlhf.rollout.environments.process import ProcessEnvironment
    env = ProcessEnvironment(make_env_factory(EnvSpec(id="{PROCESS_TASKS}:Faulty-v0")))
    env.reset(seed=0)
    env._connection.send(("step", ("hang",), {{}}))
    os.kill(os.getpid(), 9)
"""
    # The output ends when the last process that has it as standard error ends.
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def test_the_turn_limit_makes_no_further_environment() -> None:
    playing = threaded(FakeEngine("stop"))
    Tales.made.clear()
    assert [playing.turn_limit for _ in range(3)] == [None] * 3
    assert len(Tales.made) == 1
    playing.close()
