"""Online training with a vLLM server: weights, failures, resumption and `rlhf engine start`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rlhf.cli.table import COMMANDS, configure, run_command
from rlhf.config.load import merge_trees
from rlhf.errors import UserError
from rlhf.rollout.vllm import engine as engine_module
from rlhf.rollout.vllm.engine import request_seed
from rlhf.training.online_setup import check_online_config
from tests.helpers.training import (
    Tree,
    checkpoint_of,
    metrics_of,
    online_tree,
    read_rows,
    same,
    save_model,
)
from tests.helpers.vllm_server import FakeVLLM

LORA = {"model": {"lora": {"rank": 2}}}
REAL = "RLHF_VLLM_PYTHON"
FAST = {"optimizer": {"learning_rate": 3e-2}}


@pytest.fixture
def fake(echo_model: str) -> Iterator[FakeVLLM]:
    server = FakeVLLM(Path(echo_model))
    yield server
    server.kill()


def tree_of(folder: Path, place: str, url: str, /, **changes: Any) -> Tree:
    engine = {"kind": "vllm", "urls": [url], "retry_seconds": 0.5, "tolerance": 1e-3}
    base = online_tree(folder, Path(place), rollout={"max_new_tokens": 3, "engine": engine})
    return merge_trees(merge_trees(base, FAST), changes)


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_each_policy_is_published_once(fake, echo_model, tmp_path, changes, staleness):
    """Episodes before training have policy 0, evaluations 2 and 4, those after training 4.

    The batches have the policies 0, 1, 2, 3, with staleness 1 the policies 0, 0, 1, 2. With
    staleness 2 they depend on the speed.
    """
    keys = {"rollout": {"max_staleness": staleness}, "evaluation": {"every": 2, "episodes": 4}}
    tree = merge_trees(tree_of(tmp_path / "run", echo_model, fake.url, **changes), keys)
    run_command("grpo", tree)
    route = "/v1/load_lora_adapter" if changes else "/collective_rpc"
    low, high = {0: (5, 5), 1: (4, 4), 2: (3, 5)}[staleness]
    assert low <= fake.calls[route] <= high


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_every_batch_of_an_asynchronous_run_is_served_by_the_policy_before(
    fake, echo_model, tmp_path, changes
):
    changes = merge_trees(changes, {"rollout": {"max_staleness": 1}})
    run_command("grpo", tree_of(tmp_path / "run", echo_model, fake.url, **changes))
    rows = metrics_of(tmp_path / "run")
    assert [row["rollout/staleness_max"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    assert rows[0]["sampler/logprob_diff_abs"] < 1e-5
    for row in rows[1:]:
        assert row["sampler/logprob_diff_abs"] > 1e-4  # one update apart
        assert row["engine/logprob_gap"] < 1e-5
    assert list(fake.models) == ["policy"]
    assert not list((tmp_path / "run-engine").iterdir())


def served(fake: FakeVLLM) -> Counter[tuple[int, ...]]:
    """Number of completions of each training request: the probes of the weights have seed 0."""
    return Counter((body["seed"], *body["prompt"]) for body in fake.completed if body["seed"])


@pytest.mark.parametrize("staleness", [0, 1])
def test_replies_of_an_unfinished_step_are_not_sampled_again(
    fake, echo_model, tmp_path, monkeypatch, staleness
):
    """The server dies in the batch of policy 2, after two of its completions."""
    changes = {"save_every": 4, "rollout": {"parallel": 2, "max_staleness": staleness}}
    tree = tree_of(tmp_path / "run", echo_model, fake.url, **changes)
    with monkeypatch.context() as patch:
        killed_at(fake.kill, patch, step=2)
        with pytest.raises(UserError, match="no answer within"):
            run_command("grpo", tree)
    step = 2 + staleness  # of the batch that was not completed
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == list(range(1, step + 1))
    replies = read_rows(tmp_path / f"run/checkpoints/step-{step}/replies.jsonl")
    assert {(row["step"], row["policy_version"]) for row in replies} == {(step, 2)}
    assert 0 < len(replies) < 8
    before = served(fake)
    fake.start()
    run_command("grpo", {**tree, "resume": True})
    after = served(fake)
    recorded = {request_seed(tuple(row["seed"])) for row in replies}
    assert all(after[key] == before[key] for key in before if key[0] in recorded)
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert not any("rollout/replies_discarded" in row for row in rows)
    assert checkpoint_of(tmp_path / "run")["state"]["starts"] == {"count": 4}


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_every_step_samples_from_the_weights_of_the_step(fake, echo_model, tmp_path, changes):
    run_command("grpo", tree_of(tmp_path / "run", echo_model, fake.url, **changes))
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["sampler/logprob_diff_abs"] < 1e-5
        assert row["engine/logprob_gap"] < 1e-5
        assert row["engine/repeated"] == 0
    assert rows[-1]["train/moved"] > 0
    assert list(fake.models) == ["policy"]
    assert not list((tmp_path / "run-engine").iterdir())
    steps = {row["split"]: row["step"] for row in read_rows(tmp_path / "run/samples.jsonl")}
    assert steps == {"before": 0, "train": 4, "after": 4}


def killed_at(kill: Callable[[], Any], monkeypatch: Any, *, step: int) -> None:
    """Kill the server after two completions of a step."""
    poll = engine_module.VLLMEngine.poll
    seen: list[Any] = []

    def killing(self: Any) -> Any:
        completions = poll(self)
        if self.policy_version == step and not seen:
            seen.append(completions)
            kill()
        return completions

    monkeypatch.setattr(engine_module.VLLMEngine, "poll", killing)


def test_dead_server_stops_the_run_with_a_checkpoint(fake, echo_model, tmp_path, monkeypatch):
    """The resumed run collects the episodes of the step again: none is lost or counted twice."""
    changes = {"save_every": 4, "rollout": {"parallel": 2}}
    tree = tree_of(tmp_path / "run", echo_model, fake.url, **changes)
    with monkeypatch.context() as patch:
        killed_at(fake.kill, patch, step=2)
        with pytest.raises(UserError, match=r"no answer within 0\.5 s") as error:
            run_command("grpo", tree)
    assert "\n" not in str(error.value)
    state = checkpoint_of(tmp_path / "run")["state"]
    assert state["progress"]["step"] == 2
    started = state["starts"]["count"]
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]
    fake.start()
    run_command("grpo", {**tree, "resume": True})
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]
    whole = tree_of(tmp_path / "whole", echo_model, fake.url, **changes)
    run_command("grpo", whole)
    ends = [checkpoint_of(tmp_path / name)["state"] for name in ("run", "whole")]
    assert ends[0]["starts"] == ends[1]["starts"] == {"count": 2 * started}
    assert same(ends[0], ends[1])


def test_server_that_restarts_within_a_step_does_not_stop_the_run(
    fake, echo_model, tmp_path, monkeypatch
):
    tree = tree_of(tmp_path / "run", echo_model, fake.url, rollout={"parallel": 2})
    kill = fake.kill
    monkeypatch.setattr(fake, "kill", lambda: (kill(), fake.start()))
    killed_at(fake.kill, monkeypatch, step=2)
    run_command("grpo", tree)
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["sampler/logprob_diff_abs"] < 1e-5 for row in rows)
    monkeypatch.undo()


def test_one_dead_server_of_two_does_not_stop_the_run(fake, echo_model, tmp_path, monkeypatch):
    second = FakeVLLM(Path(echo_model))
    tree = tree_of(tmp_path / "run", echo_model, fake.url, rollout={"parallel": 2})
    tree["rollout"]["engine"]["urls"] = [fake.url, second.url]
    with monkeypatch.context() as patch:
        killed_at(fake.kill, patch, step=2)
        run_command("grpo", tree)
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["sampler/logprob_diff_abs"] < 1e-5 for row in rows)
    second.kill()
    fake.start()


def test_dead_server_in_an_evaluation_keeps_the_step(fake, echo_model, tmp_path, monkeypatch):
    changes = {"save_every": 4, "evaluation": {"every": 2}}
    tree = tree_of(tmp_path / "run", echo_model, fake.url, **changes)
    from rlhf.training import online

    def killing(*arguments: Any) -> Any:
        fake.kill()
        return held_out(*arguments)

    held_out = online.evaluate_held_out
    monkeypatch.setattr(online, "evaluate_held_out", killing)
    with pytest.raises(UserError, match="no answer within"):
        run_command("grpo", tree)
    monkeypatch.undo()
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]
    assert checkpoint_of(tmp_path / "run")["state"]["progress"]["step"] == 2
    fake.start()
    run_command("grpo", {**tree, "resume": True})
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_resumed_run_can_use_another_server_but_not_another_engine(echo_model, tmp_path, fake):
    tree = tree_of(tmp_path / "run", echo_model, fake.url)
    run_command("grpo", tree)
    moved = merge_trees(tree, {"rollout": {"engine": {"urls": ["http://127.0.0.1:9"]}}})
    COMMANDS.check_run_config_unchanged("grpo", moved)
    local = {**tree, "rollout": {"max_new_tokens": 3}}
    with pytest.raises(UserError, match=r"rollout\.engine\.kind was 'vllm', now 'local'"):
        COMMANDS.check_run_config_unchanged("grpo", local)


@pytest.mark.parametrize("key", ["modules_to_save", "use_dora"])
def test_adapters_that_vllm_cannot_serve_are_refused(echo_model, tmp_path, key):
    value = {"modules_to_save": ["norm"], "use_dora": True}[key]
    tree = tree_of(tmp_path, echo_model, "http://localhost:1", model={"lora": {key: value}})
    with pytest.raises(UserError, match=rf"model\.lora\.{key} cannot be used"):
        configure("grpo", tree)


def test_several_processes_are_refused(echo_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = configure("grpo", tree_of(tmp_path, echo_model, "http://localhost:1"))
    with pytest.raises(UserError, match="single training process"):
        check_online_config("grpo", config)


@pytest.fixture
def executable(tmp_path: Path) -> Path:
    """A program that is called like a Python interpreter with vLLM."""
    path = tmp_path / "python"
    root = Path(__file__).parents[2]
    path.write_text(
        f'#!/bin/sh\ncd {root}\nexec {sys.executable} -m tests.helpers.vllm_server "$@"\n'
    )
    path.chmod(0o755)
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def start(tree: Tree) -> list[str]:
    return list(COMMANDS.run_and_yield_text("engine start", configure("engine start", tree)))


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_engine_start_serves_the_initial_model(executable, echo_model, tmp_path, changes):
    url = f"http://127.0.0.1:{free_port()}"
    tree = tree_of(tmp_path / "run", echo_model, url, num_steps=1, **changes)
    settings = {"executable": str(executable), "arguments": ["--enforce-eager"]}
    settings |= {"folder": str(tmp_path / "shared")}
    tree = merge_trees(tree, {"rollout": {"engine": settings}})
    (line,) = start(tree)
    process = int(line.partition("(process ")[2].partition(",")[0])
    try:
        with pytest.raises(UserError, match="a program already answers"):
            start(tree)
        run_command("grpo", tree)
    finally:
        os.kill(process, signal.SIGKILL)
    (row,) = metrics_of(tmp_path / "run")
    assert row["engine/logprob_gap"] < 1e-5
    arguments, environment = json.loads((tmp_path / "shared/call.json").read_text())
    options = dict(itertools.pairwise(arguments))
    assert options["--logprobs-mode"] == "processed_logprobs"
    assert options["--generation-config"] == "vllm"
    assert options["--max-model-len"] == "64"
    assert options["--dtype"] == "float32"
    assert ("--enable-lora" in arguments) == bool(changes)
    assert options.get("--max-lora-rank") == ("8" if changes else None)
    assert arguments[-1] == "--enforce-eager"
    assert set(environment.values()) == {"1"}
    initial = AutoModelForCausalLM.from_pretrained(tmp_path / "shared/model").state_dict()
    given = AutoModelForCausalLM.from_pretrained(echo_model).state_dict()
    assert same(initial, given)


@pytest.mark.skipif(
    not os.environ.get(REAL),
    reason=f"SKIPPED, REAL ENGINE: {REAL} names no Python interpreter with vLLM",
)
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_real_server_that_is_killed_within_a_step_costs_no_episode(tmp_path, monkeypatch, changes):
    """The server is killed after two completions of the third step, and started again."""
    model = save_model(tmp_path / "model", width=64)  # heads of 32 channels, which vLLM supports
    url = f"http://127.0.0.1:{free_port()}"
    changes = {"save_every": 4, "rollout": {"parallel": 2}, **changes}
    tree = tree_of(tmp_path / "run", str(model), url, **changes)
    settings = {"executable": os.environ[REAL], "retry_seconds": 5.0}
    settings["arguments"] = ["--enforce-eager", "--gpu-memory-utilization", "0.3"]
    tree = merge_trees(tree, {"rollout": {"engine": settings}})
    servers = []

    def start_real_server() -> None:
        (line,) = start(tree)
        servers.append(int(line.partition("(process ")[2].partition(",")[0]))

    try:
        start_real_server()
        with monkeypatch.context() as patch:
            killed_at(lambda: os.killpg(servers[0], signal.SIGKILL), patch, step=2)
            with pytest.raises(UserError, match=r"no answer within 5 s"):
                run_command("grpo", tree)
        assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]
        replies = read_rows(tmp_path / "run/checkpoints/step-2/replies.jsonl")
        assert 0 < len(replies) < 8
        start_real_server()
        run_command("grpo", {**tree, "resume": True})
    finally:
        for process in servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["engine/logprob_gap"] < 1e-3 for row in rows)
    assert not any("rollout/replies_discarded" in row for row in rows)
    assert checkpoint_of(tmp_path / "run")["state"]["starts"] == {"count": 4}


def test_engine_start_states_why_no_server_runs(executable, echo_model, tmp_path):
    tree = tree_of(tmp_path / "run", echo_model, f"http://127.0.0.1:{free_port()}")

    def message(**settings: Any) -> str:
        with pytest.raises(UserError) as error:
            start(merge_trees(tree, {"rollout": {"engine": settings}}))
        return str(error.value)

    assert "'no-such-python' is not an executable" in message(executable="no-such-python")
    failing = {"executable": str(executable), "arguments": ["--fail"]}
    assert "ended with exit code 1; its output is in" in message(**failing)
    assert "no memory" in (tmp_path / "run-engine/server-0.log").read_text()
    sleeping = tmp_path / "sleep"
    sleeping.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeping.chmod(0o755)
    assert "did not answer within 0.2 s" in message(executable=str(sleeping), start_seconds=0.2)
    local = {**tree, "rollout": {"max_new_tokens": 3}}
    with pytest.raises(UserError, match=r"rollout\.engine\.kind is local"):
        start(local)
