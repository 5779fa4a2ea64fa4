"""Rollouts that are collected while the policy is trained: staleness, failures, resumption."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import rlhf
from benchmarks.learning import CONFIG_FOLDER, REQUIRED_FRACTION, read_result
from rlhf.algorithms.batch import TrainingBatch
from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS, configure, run_command
from rlhf.common.files import read_jsonl
from rlhf.config.load import merge_trees
from rlhf.envs.core import TextEnv
from rlhf.errors import UserError
from rlhf.rollout.sampling.continuous import ContinuousEngine
from rlhf.training import online
from rlhf.training.online import REPLIES_FILE, OnlineTrainer
from rlhf.training.online_setup import check_online_config
from rlhf.training.rollouts import source as rollout_source
from rlhf.training.rollouts.schedule import RolloutSchedule
from tests.helpers.command_line import arguments
from tests.helpers.training import (
    Tree,
    assert_same_run,
    checkpoint_of,
    metrics_of,
    online_tree,
    read_rows,
    same,
    weights_of,
)

WAIT = 60.0
"""Time limit of a wait that a correct program ends at once, in seconds."""
ONE = {"rollout": {"max_staleness": 1}, "optimizer": {"learning_rate": 3e-2}}
CASES = {
    "grpo": {"model": {"lora": {"rank": 2}}, "algorithm": {"num_epochs": 2}},
    "ppo": {
        "critic": "separate",
        "kl": {"controller": "adaptive", "target": 0.001, "horizon": 40},
        "shaping": {"scale": "normalize", "missing_eos_penalty": 0.5},
        "evaluation": {"episodes": 4, "every": 2},
    },
    "dapo": {"algorithm": {"group_size": 4}},
}


def tree_of(folder: Path, place: Any, *changes: Tree) -> Tree:
    tree = online_tree(folder, Path(place))
    for change in (ONE, *changes):
        tree = merge_trees(tree, change)
    return tree


def steps_of(folder: Path, *, drop: Sequence[str] = ()) -> list[Tree]:
    """Metrics without those that only asynchronous runs have, and without some others."""
    extra = ("rollout/staleness", "sampler/weight_mean", "sampler/ess", *drop)
    return [
        {key: value for key, value in row.items() if not key.startswith(extra)}
        for row in metrics_of(folder)
    ]


@pytest.mark.parametrize("command", CASES)
def test_a_background_without_staleness_is_the_synchronous_loop(
    tmp_path, echo_model, monkeypatch, command
):
    """The copy of the weights, the thread and the queue change no bit of a run."""
    synchronous = merge_trees(CASES[command], {"rollout": {"max_staleness": 0}})
    run_command(command, tree_of(tmp_path / "plain", echo_model, synchronous))

    def without_staleness(**settings: Any) -> RolloutSchedule:
        return RolloutSchedule(**{**settings, "max_staleness": 0})

    monkeypatch.setattr(rollout_source, "RolloutSchedule", without_staleness)
    run_command(command, tree_of(tmp_path / "thread", echo_model, CASES[command]))
    rows = metrics_of(tmp_path / "thread")
    assert {row["rollout/staleness_max"] for row in rows} == {0.0}
    assert steps_of(tmp_path / "plain") == steps_of(tmp_path / "thread")
    for part in (weights_of, checkpoint_of):
        assert same(part(tmp_path / "plain"), part(tmp_path / "thread"))
    samples = [read_rows(tmp_path / name / "samples.jsonl") for name in ("plain", "thread")]
    assert samples[0] == samples[1]


def recorded_batches(monkeypatch: Any) -> list[TrainingBatch]:
    """The batches of the training steps of a run."""
    batches: list[TrainingBatch] = []
    make = online.make_training_batch

    def recorded(*given: Any) -> Any:
        batch, metrics = make(*given)
        batches.append(batch)
        return batch, metrics

    monkeypatch.setattr(online, "make_training_batch", recorded)
    return batches


@torch.no_grad()
def logprobs_under(folder: Path, batch: TrainingBatch) -> torch.Tensor:
    """Log-probabilities of the sampled tokens under the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long()).logits
    found = torch.zeros(batch.tokens.shape)
    found[:, 1:] = logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
    return found[batch.action_mask]


def test_every_batch_is_sampled_by_the_policy_of_the_step_before(tmp_path, echo_model, monkeypatch):
    """The log-probabilities of the sampler are those of the checkpoint before the last one."""
    batches = recorded_batches(monkeypatch)
    run_command("grpo", tree_of(tmp_path / "run", echo_model, {"keep_last": 9}))
    rows = metrics_of(tmp_path / "run")
    assert [row["rollout/staleness_max"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    assert [row["rollout/staleness_mean"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    places = [Path(echo_model), *(tmp_path / f"run/checkpoints/step-{n}" for n in range(1, 5))]
    for step, batch in enumerate(batches):
        sampler = batch.require("sampler_logprobs")[batch.action_mask]
        old = batch.require("old_logprobs")[batch.action_mask]
        behavior = logprobs_under(places[max(0, step - 1)], batch)
        start_of_update = logprobs_under(places[step], batch)
        torch.testing.assert_close(sampler, behavior, atol=1e-4, rtol=0)
        torch.testing.assert_close(old, start_of_update, atol=1e-4, rtol=0)
        assert ((behavior - start_of_update).abs().max() > 1e-3) == (step > 0)


def test_the_next_batch_is_collected_during_the_update(tmp_path, echo_model, monkeypatch):
    """The update waits for the next batch, which a synchronous loop would collect later."""
    collected = {step: threading.Event() for step in range(5)}
    collect, update = rollout_source._collect_with_completions, online.update_policy

    def collect_and_tell(collector: Any, engine: Any, step: int, **settings: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        found = collect(collector, engine, step, **settings)
        collected[step].set()
        return found

    def update_later(trainer: Any, batch: Any, *, step: int) -> Any:
        assert step == 3 or collected[step + 1].wait(WAIT)
        assert not collected[min(step + 2, 4)].is_set()
        return update(trainer, batch, step=step)

    monkeypatch.setattr(rollout_source, "_collect_with_completions", collect_and_tell)
    monkeypatch.setattr(online, "update_policy", update_later)
    run_command("grpo", tree_of(tmp_path / "run", echo_model))
    assert [event.is_set() for event in collected.values()] == [True] * 4 + [False]


@pytest.mark.parametrize("command", CASES)
def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_run(
    tmp_path, echo_model, monkeypatch, command
):
    """With one update of staleness, the replies of the waiting batch are replayed to the bit."""
    run_command(command, tree_of(tmp_path / "whole", echo_model, CASES[command]))
    step = OnlineTrainer.step

    def interrupted(trainer: Any, number: int, run: Any) -> Any:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, number, run)

    monkeypatch.setattr(OnlineTrainer, "step", interrupted)
    options = arguments(tree_of(tmp_path / "cut", echo_model, CASES[command]))
    assert main([command, *options]) == 130
    monkeypatch.undo()
    replies = read_jsonl(tmp_path / "cut/checkpoints/step-2" / REPLIES_FILE)
    expected = {(2, 1)}
    if "evaluation" in CASES[command]:  # which has published policy 2, so the next batch began
        expected |= {(3, 2)}
    assert {(row["step"], row["policy_version"]) for row in replies} == expected
    assert main([command, *options, "--resume"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert not list((tmp_path / "cut/checkpoints/step-4").glob(REPLIES_FILE))


def sampled_episodes(monkeypatch: Any) -> Counter[tuple[int, ...]]:
    """Seeds of the requests of training that an engine sampled, with their numbers."""
    seeds: Counter[tuple[int, ...]] = Counter()
    submit = ContinuousEngine.submit

    def counted(engine: ContinuousEngine, requests: Any) -> None:
        seeds.update(request.seed for request in requests if request.seed[1] < 2**30)
        submit(engine, requests)

    monkeypatch.setattr(ContinuousEngine, "submit", counted)
    return seeds


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_no_reply_is_sampled_twice_or_lost_if_a_run_is_resumed(
    tmp_path, echo_model, monkeypatch, staleness
):
    batches = recorded_batches(monkeypatch)
    seeds = sampled_episodes(monkeypatch)
    step = OnlineTrainer.step

    def failing(trainer: Any, number: int, run: Any) -> Any:
        if number == 3:
            raise RuntimeError("the process dies")
        return step(trainer, number, run)

    limit = {"rollout": {"max_staleness": staleness}, "num_steps": 6}
    tree = tree_of(tmp_path / "run", echo_model, limit)
    with monkeypatch.context() as patch:
        patch.setattr(OnlineTrainer, "step", failing)
        with pytest.raises(RuntimeError, match="dies"):
            run_command("grpo", tree)
    waiting = read_jsonl(tmp_path / "run/checkpoints/step-3" / REPLIES_FILE)
    assert {3} <= {row["step"] for row in waiting} <= set(range(3, 3 + staleness))
    run_command("grpo", {**tree, "resume": True})
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["rollout/staleness_max"] <= staleness for row in rows)
    assert not any("rollout/replies_discarded" in row for row in rows)
    assert set(seeds.values()) == {1}
    assert sum(seeds.values()) == 6 * 8
    assert checkpoint_of(tmp_path / "run")["state"]["starts"] == {"count": 6}
    assert len(batches) == 6


def test_replies_that_are_too_old_after_a_change_of_the_limit_are_sampled_again(
    tmp_path, echo_model, monkeypatch
):
    seeds = sampled_episodes(monkeypatch)
    tree = tree_of(tmp_path / "run", echo_model)
    step = OnlineTrainer.step

    def failing(trainer: Any, number: int, run: Any) -> Any:
        if number == 2:
            raise RuntimeError("the process dies")
        return step(trainer, number, run)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineTrainer, "step", failing)
        with pytest.raises(RuntimeError, match="dies"):
            run_command("grpo", tree)
    synchronous = merge_trees(tree, {"rollout": {"max_staleness": 0}, "resume": True})
    COMMANDS.check_run_config_unchanged("grpo", synchronous)
    run_command("grpo", synchronous)
    rows = metrics_of(tmp_path / "run")
    assert [row.get("rollout/replies_discarded") for row in rows] == [None, None, 8.0, None]
    assert [row["sampler/logprob_diff_abs"] > 1e-3 for row in rows] == [False, True, False, False]
    assert Counter(seeds.values()) == {1: 3 * 8, 2: 8}


class Fragile(TextEnv):
    """Fails in training episodes from a seed on."""

    fails_from = 1000

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None and self.fails_from <= seed < 2**30:
            raise RuntimeError("broken")
        return self.opening("Repeat: apple")

    def step(self, action):
        return self.turn("", float(len(action)), True)


gym.register("fragile/Fragile-v0", entry_point=Fragile)


@pytest.mark.parametrize("concurrency", ["lockstep", "threads"])
def test_a_failure_in_the_background_ends_the_run_after_the_complete_batches(
    tmp_path, echo_model, monkeypatch, concurrency
):
    """A step has one group, so the third batch has the seed 2."""
    monkeypatch.setattr(Fragile, "fails_from", 2)
    env = {"id": "fragile/Fragile-v0", "concurrency": concurrency}
    tree = tree_of(tmp_path / "run", echo_model, {"rewards": []}) | {"env": env}
    with pytest.raises(UserError, match=r"failed in the episode of seed 2: RuntimeError: broken"):
        run_command("grpo", tree)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def test_a_run_that_ends_early_stops_the_background(tmp_path, echo_model):
    """The budget of the KL ends training while later batches are collected."""
    keys = {"kl": {"controller": "budget", "target": 1e-4}, "num_steps": 30}
    final = run_command("ppo", tree_of(tmp_path / "run", echo_model, keys))
    assert 2 <= len(metrics_of(tmp_path / "run")) < 30
    assert (final / "model.safetensors").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]


class Held(TextEnv):
    """Its episodes of one seed wait in `step` until the test releases them."""

    seed_held = 2
    entered, released, returned = threading.Event(), threading.Event(), threading.Event()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.held = seed == self.seed_held
        return self.opening("Repeat: apple")

    def step(self, action):
        if self.held:
            self.entered.set()
            self.released.wait(WAIT)
            self.returned.set()
        return self.turn("", float(len(action)), True)


gym.register("held/Held-v0", entry_point=Held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("entered", "released", "returned"):
        monkeypatch.setattr(Held, name, threading.Event())
    monkeypatch.setattr(rollout_source, "STOP_TIMEOUT_SECONDS", 0.1)
    yield Held
    Held.released.set()
    for thread in threading.enumerate():
        if thread.name == "rollouts":
            thread.join(WAIT)


@pytest.mark.parametrize("concurrency", ["lockstep", "threads"])
def test_a_run_that_fails_does_not_wait_for_an_environment_that_hangs(
    tmp_path, echo_model, monkeypatch, held, concurrency
):
    """The environment is in use, so that closing it would wait for its call."""

    def fail(*arguments: Any, **options: Any) -> Any:
        assert held.entered.wait(WAIT)
        raise RuntimeError("the update fails")

    monkeypatch.setattr(online, "update_policy", fail)
    env = {"id": "held/Held-v0", "concurrency": concurrency}
    monkeypatch.setattr(held, "seed_held", 1)
    tree = tree_of(tmp_path / "run", echo_model, {"rewards": []}) | {"env": env}
    with pytest.raises(RuntimeError, match="the update fails"):
        run_command("grpo", tree)
    assert not held.returned.is_set()


def test_the_final_evaluation_begins_when_the_engine_is_free(
    tmp_path, echo_model, monkeypatch, held
):
    """The thread of a run that ends early waits for its environment longer than the time limit."""
    stop, evaluate = rollout_source.BackgroundSource.stop, online.write_held_out_transcripts

    def stop_and_release(source: Any) -> bool:
        assert held.entered.wait(WAIT)
        ended = stop(source)
        threading.Timer(0.5, held.released.set).start()
        return ended

    def evaluate_alone(trainer: Any, run: Any, *, split: str) -> Any:
        assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]
        return evaluate(trainer, run, split=split)

    monkeypatch.setattr(rollout_source.BackgroundSource, "stop", stop_and_release)
    monkeypatch.setattr(online, "write_held_out_transcripts", evaluate_alone)
    monkeypatch.setattr(OnlineTrainer, "done", property(lambda trainer: trainer.progress.step == 2))
    tree = tree_of(tmp_path / "run", echo_model, {"rewards": []})
    run_command("grpo", tree | {"env": {"id": "held/Held-v0", "concurrency": "threads"}})
    assert len(metrics_of(tmp_path / "run")) == 2


def test_several_processes_and_time_limits_of_the_main_thread_are_refused(
    tmp_path, echo_model, monkeypatch, caplog
):
    limited = configure("grpo", tree_of(tmp_path, echo_model, {"env": {"timeout": 1.0}}))
    with pytest.raises(UserError, match=r"env\.timeout cannot be used .* env\.concurrency"):
        check_online_config("grpo", limited)
    threads = {"env": {"timeout": 1.0, "concurrency": "threads"}}
    check_online_config("grpo", configure("grpo", tree_of(tmp_path, echo_model, threads)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="single training process"):
        check_online_config("grpo", configure("grpo", tree_of(tmp_path, echo_model)))


@pytest.mark.parametrize(
    ("command", "settings", "warns"),
    [
        ("grpo", {}, True),
        ("grpo", {"tis_cap": 2.0}, False),
        ("grpo", {"sequence_mask_high": 1.1}, False),
        ("best_of_n", {}, False),  # its loss has no importance weights
    ],
)
def test_stale_rollouts_without_a_correction_are_a_warning(
    tmp_path, echo_model, caplog, command, settings, warns
):
    tree = tree_of(tmp_path, echo_model, {"algorithm": settings})
    check_online_config(command, configure(command, tree))
    assert ("without a correction; set algorithm.tis_cap" in caplog.text) == warns


@pytest.mark.sweep
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("seed", range(3))
def test_stale_rollouts_with_corrections_reach_the_optimum(tmp_path, algorithm, seed):
    """Echo with 16 words, from a policy that repeats about half of them."""
    tree = yaml.safe_load((CONFIG_FOLDER / "echo.yaml").read_text())
    tree["stages"] = [s for s in tree["stages"] if s["name"] not in {"ppo", "grpo"} - {algorithm}]
    *_, stage, evaluation = tree["stages"]
    stage["rollout"]["max_staleness"] = 1
    stage["algorithm"] |= {"tis_cap": 2.0, "sequence_mask_low": 0.2, "sequence_mask_high": 5.0}
    evaluation["policies"] = [p for p in evaluation["policies"] if p["name"] in ("sft", algorithm)]
    (tmp_path / "echo.yaml").write_text(yaml.safe_dump(tree))
    rlhf.run(tmp_path / "echo.yaml", output_dir=str(tmp_path / "run"), seed=seed)
    before, after = (read_result(tmp_path / "run", name) for name in ("sft", algorithm))
    assert before["share"] < 0.8
    assert after["share"] >= REQUIRED_FRACTION
    rows = metrics_of(tmp_path / "run" / algorithm)
    assert {row["rollout/staleness_max"] for row in rows[1:]} == {1.0}
