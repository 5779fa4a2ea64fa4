"""Each kind of failure of an environment stops the run with one line, or is counted."""

import os
import signal
import sys
from typing import Any

import pytest
import torch

from rlhf.errors import UserError
from rlhf.runs.interrupt import StopSignalRecorder
from tests.helpers.faulty_steps import GOOD, STEPS, tale_with
from tests.helpers.rollouts import FakeEngine, Tales, episode_seeds, make_collector


@pytest.mark.parametrize("kind", STEPS)
def test_a_failure_stops_the_run_with_its_reason_and_seed(kind: str) -> None:
    step, reason = STEPS[kind]
    playing = make_collector(FakeEngine("go"), tale_with(step), timeout=0.05)
    with pytest.raises(UserError, match=rf"episode of seed 41: .*{reason}") as error:
        playing.collect(episode_seeds(41))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", STEPS)
def test_a_failure_is_counted_and_the_other_episodes_go_on(kind: str) -> None:
    step, _ = STEPS[kind]

    def sometimes(env: Any, action: str) -> Any:
        return step(env, action) if env.seed == 1 else GOOD

    class Seeded(tale_with(sometimes)):
        def reset(self, *, seed=None, options=None):
            self.seed = seed
            return super().reset(seed=seed)

    playing = make_collector(FakeEngine("go"), Seeded, errors="count", timeout=0.05, parallel=2)
    assert [rollout.seed for rollout in playing.collect(episode_seeds(0, 1, 2))] == [0, 2]
    assert playing.workers.caller.failures.total() == 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (["hi"], "TypeError"),
        ([{"role": "user"}], "TypeError"),
        (3, "TypeError"),
        ([{"role": 7, "content": "x"}], r'the role of info\["messages"\] is of type int'),
        ([{"role": "\ud800", "content": "x"}], r'the role of info\["messages"\] contains half'),
        ([{"role": "user", "content": "\ud800"}], r'the content of info\["messages"\] contains'),
    ],
)
def test_messages_before_the_first_observation_are_checked(messages: Any, words: str) -> None:
    playing = make_collector(FakeEngine("go"), lambda: Tales(messages=messages))
    with pytest.raises(UserError, match=f"episode of seed 5: .*{words}"):
        playing.collect(episode_seeds(5))


def test_output_of_an_environment_is_not_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    def chatty(env: Any, action: str) -> Any:
        print("a move")
        return GOOD

    make_collector(FakeEngine("go"), tale_with(chatty)).collect(episode_seeds(0))
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "a move\n")


def test_an_environment_cannot_close_the_output_streams(capsys: pytest.CaptureFixture[str]) -> None:
    def closing(env: Any, action: str) -> Any:
        with sys.stderr:
            print("a move")
        sys.stdout.close()
        return GOOD

    make_collector(FakeEngine("go"), tale_with(closing)).collect(episode_seeds(0))
    print("the log", file=sys.stderr)
    print("the result")
    assert capsys.readouterr() == ("the result\n", "a move\nthe log\n")


def test_an_environment_that_does_not_close_stops_nothing() -> None:
    class Open(Tales):
        def close(self) -> None:
            sys.exit(3)

    playing = make_collector(FakeEngine("stop"), Open)
    playing.collect(episode_seeds(0))
    playing.close()
    assert playing.envs == []


class FaultyEngine(FakeEngine):
    """Changes its completions."""

    def __init__(self, change: Any) -> None:
        super().__init__("stop")
        self.change = change

    def poll(self) -> Any:
        return [self.change(completion) for completion in super().poll()]


def test_completions_of_an_engine_are_checked() -> None:
    from dataclasses import replace

    def unknown(completion: Any) -> Any:
        return replace(completion, request=replace(completion.request, request_id=-1))

    def scored(value: float, *more: float) -> Any:
        def change(completion: Any) -> Any:
            size = len(completion.tokens)
            return replace(completion, logprobs=[value] * size + list(more))

        return change

    with pytest.raises(UserError, match="was not requested"):
        make_collector(FaultyEngine(unknown)).collect(episode_seeds(7))
    for change in (scored(-1.0, -1.0), scored(float("nan"))):
        with pytest.raises(
            UserError, match=r"log-probabilities in the episode of seed 7; .*finite"
        ):
            make_collector(FaultyEngine(change)).collect(episode_seeds(7))


def test_an_engine_cannot_end_the_process() -> None:
    with pytest.raises(RuntimeError, match=r"called sys.exit\(0\)"):
        make_collector(FaultyEngine(lambda completion: sys.exit(0))).collect(episode_seeds(7))


class Silent(BaseException):
    """Its conversion to text ends the process."""

    def __str__(self) -> str:
        sys.exit(0)


def raising(error: BaseException) -> Any:
    def step(env: Any, action: str) -> Any:
        raise error

    return step


@pytest.mark.parametrize("error", [GeneratorExit(), KeyboardInterrupt(), StopIteration(), Silent()])
def test_every_exception_is_a_failure_of_the_episode(error: BaseException) -> None:
    playing = make_collector(FakeEngine("go"), tale_with(raising(error)))
    with (
        StopSignalRecorder(),
        pytest.raises(UserError, match=rf"episode of seed 41: .*{type(error).__name__}"),
    ):
        playing.collect(episode_seeds(41))


def test_ctrl_c_in_an_environment_ends_the_process() -> None:
    playing = make_collector(FakeEngine("go"), tale_with(raising(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        playing.collect(episode_seeds(0))


HELD: list[Any] = []
"""Contexts that are never left."""


def leave_open(context: Any) -> None:
    HELD.append(context)
    context.__enter__()


CHANGES = {
    "directory": lambda: os.chdir("/"),
    "gradients": lambda: torch.set_grad_enabled(False),
    "inference": lambda: leave_open(torch.inference_mode()),
    "autocast": lambda: leave_open(torch.autocast("cpu", torch.bfloat16)),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "standard error": lambda: setattr(sys, "stderr", None),
    "handler": lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    "alarm handler": lambda: signal.signal(signal.SIGALRM, signal.SIG_IGN),
    "timer": lambda: signal.alarm(600),
}


def process_state() -> list[Any]:
    return [
        os.getcwd(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.ones(1).device,
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        sys.stderr is None,
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGALRM),
        signal.getitimer(signal.ITIMER_REAL)[0] > 0,
    ]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", CHANGES)
def test_the_state_of_the_process_is_restored(kind: str, gradients: bool) -> None:
    changed = []

    def changing(env: Any, action: str) -> Any:
        CHANGES[kind]()
        changed.append(process_state())
        return GOOD

    with StopSignalRecorder(), torch.set_grad_enabled(gradients):
        before, stderr = process_state(), sys.stderr
        make_collector(FakeEngine("go"), tale_with(changing)).collect(episode_seeds(0))
        assert process_state() == before
        assert sys.stderr is stderr
        assert (changed[0] != before) == (kind != "gradients" or gradients)


def test_a_running_timer_is_kept() -> None:
    """A program that calls the toolkit may limit its own time."""
    signal.alarm(600)
    try:
        make_collector(FakeEngine("go"), tale_with(lambda env, action: GOOD)).collect(
            episode_seeds(0)
        )
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        signal.alarm(0)


def test_a_long_reason_is_shortened() -> None:
    def fails(env: Any, action: str) -> Any:
        raise ValueError("x" * 10**6)

    calls = make_collector(FakeEngine("go"), tale_with(fails))
    with pytest.raises(UserError, match="ValueError: xxx") as caught:
        calls.collect(episode_seeds(0))
    assert len(str(caught.value)) < 1000


def test_a_precision_that_only_the_new_functions_of_torch_can_read_is_kept() -> None:
    """The older function raises an error if one backend differs."""
    precision = torch.get_float32_matmul_precision()
    backend = torch.backends.cuda.matmul
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("this version of torch has one precision for all backends")
    try:
        backend.fp32_precision = "tf32"
        make_collector(FakeEngine("go"), tale_with(lambda env, action: GOOD)).collect(
            episode_seeds(0)
        )
        assert backend.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("fails", [True, False])
def test_a_forked_process_does_not_continue_the_run(tmp_path: Any, fails: bool) -> None:
    children = []

    def forking(env: Any, action: str) -> Any:
        children.append(os.fork())
        if children[-1] == 0 and fails:
            raise ValueError
        return GOOD

    make_collector(FakeEngine("go"), tale_with(forking), errors="count").collect(episode_seeds(0))
    (tmp_path / str(os.getpid())).touch()  # a second process would write its own file
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1
    assert len(list(tmp_path.iterdir())) == 1
