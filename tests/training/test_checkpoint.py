"""Damaged checkpoints are replaced by the one before; a failing evaluation costs nothing."""

import dataclasses
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest

from rlhf.cli.main import main
from rlhf.cli.table import configure, run_command
from rlhf.envs.echo import Echo
from rlhf.errors import UserError
from rlhf.models.rewards import load_rewards
from rlhf.runs import directory, interrupt
from rlhf.runs.alarms import Halt
from rlhf.runs.checksums import files_without_checksum, verify_checksums, write_checksums
from rlhf.runs.diagnostics import gold_metric_key
from rlhf.runs.interrupt import Interrupted, StopSignalRecorder
from rlhf.runs.metric_log import MetricLog
from rlhf.training import loop, online
from rlhf.training.distributed import World
from rlhf.training.online import OnlineTrainer
from tests.helpers.training import (
    assert_same_run,
    checkpoint_of,
    metrics_of,
    offline_tree,
    online_tree,
    same,
    sft_rows,
    tensors_of,
    write_rows,
)


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate_the_optimizer(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])


def remove_the_state(folder):
    (folder / "state.json").unlink()


def remove_the_checksums(folder):
    (folder / "checksums.json").unlink()


def garble_the_checksums(folder):
    (folder / "checksums.json").write_text("{")


def replace_the_checksums_by_a_list(folder):
    (folder / "checksums.json").write_text("[]")


def empty_the_checksums(folder):
    (folder / "checksums.json").write_text("{}")


def replace_the_folder_by_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def replace_the_folder_by_a_broken_link(folder):
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


DAMAGES = (
    flip_a_bit,
    truncate_the_optimizer,
    remove_the_state,
    remove_the_checksums,
    garble_the_checksums,
    replace_the_checksums_by_a_list,
    empty_the_checksums,
    replace_the_folder_by_a_file,
    replace_the_folder_by_a_broken_link,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, echo_model):
    """A whole run, and one that a signal stopped after three of its four steps."""
    root = tmp_path_factory.mktemp("checkpoints")
    run_command("ppo", online_tree(root / "whole", echo_model))
    original = OnlineTrainer.step

    def interrupted(trainer, step, run):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, step, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineTrainer, "step", interrupted)
        with pytest.raises(Interrupted, match="stopped by SIGTERM; continue with --resume"):
            run_command("ppo", online_tree(root / "cut", echo_model))
    return root


@pytest.fixture
def cut(runs, tmp_path):
    shutil.copytree(runs / "cut", tmp_path / "cut")
    return tmp_path / "cut"


def test_the_last_checkpoints_are_kept(cut):
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["step-2", "step-3"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(cut, runs, echo_model, damage, caplog):
    damage(cut / "checkpoints/step-3")
    run_command("ppo", online_tree(cut, echo_model, resume=True))
    assert "step-3" in caplog.text
    assert "using the previous checkpoint instead" in caplog.text
    assert_same_run(runs / "whole", cut)


@pytest.mark.parametrize("writes", [True, False])
def test_only_the_first_process_removes_damaged_checkpoints(cut, monkeypatch, writes):
    flip_a_bit(cut / "checkpoints/step-3")
    loaded = []
    monkeypatch.setattr(loop, "load_checkpoint", lambda path, trainer: loaded.append(path.name))
    trainer = SimpleNamespace(
        config=SimpleNamespace(resume=True, keep_last=2),
        keep_best=False,
        progress=SimpleNamespace(step=2),
        world=SimpleNamespace(first_not_none=lambda value: value or cut / "checkpoints/step-2"),
    )
    run = SimpleNamespace(writes=writes, changes=(), rewind=lambda step: None)
    loop._resume_or_start(trainer, run, cut / "checkpoints")
    assert loaded == ["step-2"]
    assert (cut / "checkpoints/step-3").exists() == (not writes)


def test_a_run_without_a_whole_checkpoint_is_not_continued(cut, echo_model, caplog):
    for step in (2, 3):
        flip_a_bit(cut / f"checkpoints/step-{step}")
    with pytest.raises(UserError, match=r"step-3/model\.safetensors is damaged.*start a new run"):
        run_command("ppo", online_tree(cut, echo_model, resume=True))
    assert (cut / "checkpoints/step-2").exists()
    assert (cut / "metrics.jsonl").exists()
    assert "using the previous checkpoint" not in caplog.text


def test_other_names_among_the_checkpoints_are_left_alone(cut, runs, echo_model):
    shutil.copytree(cut / "checkpoints/step-2", cut / "checkpoints/step-2-copy")
    (cut / "checkpoints/step-notes.txt").write_text("written by hand")
    run_command("ppo", online_tree(cut, echo_model, resume=True))
    names = sorted(path.name for path in (cut / "checkpoints").iterdir())
    assert names == ["step-2-copy", "step-3", "step-4", "step-notes.txt"]
    shutil.rmtree(cut / "checkpoints/step-2-copy")
    (cut / "checkpoints/step-notes.txt").unlink()
    assert_same_run(runs / "whole", cut)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.yaml", "a: [", "cannot be read"),
        ("config.yaml", "", "expected a mapping"),
        ("inputs.json", "[]", "expected a mapping"),
        ("inputs.json", '{"a', "broken JSON"),
    ],
)
def test_a_damaged_description_is_one_line(cut, echo_model, name, content, words):
    (cut / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}.*{words}"):
        run_command("ppo", online_tree(cut, echo_model, resume=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "state.json").write_text("{}"),
        lambda folder: (folder / "state.json").write_text('{"progress": {'),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "optimizer.pt").write_bytes(b"x"),
        lambda folder: (folder / "optimizer.pt").write_bytes(b"junk"),  # a part of a number
        lambda folder: (folder / "optimizer.pt").write_bytes(b""),
        lambda folder: (folder / "value_head.safetensors").unlink(),
    ],
)
def test_a_checkpoint_of_another_run_is_one_line(cut, echo_model, capsys, change):
    """Its checksums are right, so it is not damaged."""
    folder = max((cut / "checkpoints").glob("step-*"), key=lambda path: path.name)
    change(folder)
    write_checksums(folder)
    tree = online_tree(cut, echo_model) | {"resume": True}
    with pytest.raises(UserError, match=rf"{folder.name} does not fit this run .*; remove it") as e:
        run_command("ppo", tree)
    assert "\n" not in str(e.value)
    shutil.rmtree(folder)
    run_command("ppo", tree)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_of_trl_that_was_changed_is_one_line(tmp_path, echo_model, name):
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    tree = offline_tree(tmp_path / "run", echo_model, data, engine="trl", evaluations=2)
    tree |= {
        "trainer": {"max_steps": 4},
        "callbacks": ["tests.training.test_callbacks:fail_at_three"],
    }
    with pytest.raises(UserError, match="at step 3"):
        run_command("sft", tree)
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    (folder / name).write_bytes(b"junk")
    write_checksums(folder)
    with pytest.raises(UserError, match=r"checkpoint-2 does not fit this run .*; remove it") as e:
        run_command("sft", tree | {"resume": True})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [None, ""])
def test_a_lost_metrics_file_is_stated(cut, echo_model, caplog, content):
    log = cut / "metrics.jsonl"
    log.unlink() if content is None else log.write_text(content)
    run_command("ppo", online_tree(cut, echo_model) | {"resume": True})
    assert "metrics.jsonl has no rows, although 3 steps are done" in caplog.text


def test_a_lost_row_of_the_metrics_is_stated(cut, echo_model, caplog):
    """A kill cannot leave an incomplete row of a step before the checkpoint, a fault can."""
    log = cut / "metrics.jsonl"
    steps = len(metrics_of(cut))
    log.write_bytes(log.read_bytes()[:-5])
    run_command("ppo", online_tree(cut, echo_model) | {"resume": True})
    assert f"in the middle of the row of step {steps}, which is lost" in caplog.text


def test_a_copied_run_directory_continues(cut, runs, echo_model):
    run_command("ppo", online_tree(cut, echo_model, resume=True))
    assert_same_run(runs / "whole", cut)


def test_the_final_model_has_checksums(runs):
    verify_checksums(runs / "whole/final")
    assert not list(files_without_checksum(runs / "whole/final"))


def test_keep_last_is_the_number_of_checkpoints(tmp_path, echo_model):
    run_command("ppo", online_tree(tmp_path / "run", echo_model, keep_last=3))
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-2", "step-3", "step-4"]


def planted_scores(patch):
    """Held-out returns of 0.1, 0.9, 0.5 and 0.9 after the steps 1 to 4."""

    def evaluate(trainer):
        return {"eval/return": [0.1, 0.9, 0.5, 0.9][trainer.progress.step - 1]}

    patch.setattr(OnlineTrainer, "evaluate", evaluate)


def test_keep_best_keeps_the_model_of_the_first_best_evaluation(
    tmp_path, runs, echo_model, monkeypatch
):
    keys = {"evaluation": {"episodes": 4, "every": 1}, "keep_best": True}
    planted_scores(monkeypatch)
    run_command("ppo", online_tree(tmp_path / "run", echo_model, keep_last=4, **keys))
    checkpoints = tmp_path / "run/checkpoints"
    assert len(list(checkpoints.iterdir())) == 5
    verify_checksums(checkpoints / "best")
    weights = {name: tensors_of(checkpoints / name) for name in ("best", "step-2", "step-4")}
    assert same(weights["best"], weights["step-2"])
    assert not same(weights["best"], weights["step-4"])
    assert same(tensors_of(tmp_path / "run/final"), weights["step-4"])
    assert same(weights["step-4"], tensors_of(runs / "whole/checkpoints/step-4"))

    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    for name in ("step-2", "step-3", "step-4", "best"):  # killed while best was replaced
        shutil.rmtree(tmp_path / "cut/checkpoints" / name)
    shutil.rmtree(tmp_path / "cut/final")
    shutil.copytree(checkpoints / "step-1", tmp_path / "cut/checkpoints/.best.rlhf-old")
    (tmp_path / "cut/finished").unlink()
    tree = online_tree(tmp_path / "cut", echo_model, keep_last=4, resume=True, **keys)
    run_command("ppo", tree)
    assert_same_run(tmp_path / "run", tmp_path / "cut")
    assert same(tensors_of(tmp_path / "cut/checkpoints/best"), weights["best"])
    assert not list((tmp_path / "cut/checkpoints").glob(".*"))


def test_evaluations_are_compared_by_gold_then_return_then_reward(tmp_path, echo_model):
    metrics = {"eval/return": 0.2, "eval/proxy": 0.3, "eval/judge": 0.4}
    trainer = object.__new__(OnlineTrainer)
    judge = [{"kind": "length", "name": "judge"}]
    proxy = [{"kind": "length", "name": "proxy"}]
    prompts = {"id": None, "prompts": [{"path": "prompts.jsonl"}]}
    for keys, score in (
        ({"gold": judge, "rewards": proxy}, 0.4),
        ({"rewards": proxy}, 0.2),
        ({"rewards": proxy, "env": prompts}, 0.3),
    ):
        trainer.config = configure("ppo", online_tree(tmp_path, echo_model, **keys))
        trainer.rewards = load_rewards(trainer.config.rewards)
        assert trainer.model_selection_loss(metrics) == -score
        row = {"step": 1, **metrics, "reward/env": 0.0}
        log = MetricLog(config=dataclasses.asdict(trainer.config), metrics=[row])
        key = gold_metric_key(log)  # the alarms and the report use the same gold score
        assert key is None or metrics[key] == score
    assert trainer.model_selection_loss({}) == math.inf


@pytest.mark.parametrize(
    ("rewards", "metrics", "score"),
    [
        (
            {"kind": "function", "path": "tests.helpers.training:judge"},
            {"eval/judge": 0.4},
            0.4,
        ),
        ({"kind": "length", "weight": -1.0}, {"eval/length": 0.4, "eval/score": -0.4}, -0.4),
    ],
)
def test_evaluations_are_compared_by_what_is_trained(tmp_path, echo_model, rewards, metrics, score):
    trainer = object.__new__(OnlineTrainer)
    prompts = {"id": None, "prompts": [{"path": "prompts.jsonl"}]}
    tree = online_tree(tmp_path, echo_model, env=prompts, rewards=[rewards])
    trainer.config = configure("ppo", tree)
    trainer.rewards = load_rewards(trainer.config.rewards)
    assert trainer.model_selection_loss(metrics) == -score


def test_a_failing_evaluation_does_not_cost_the_model(
    tmp_path, runs, echo_model, monkeypatch, capsys
):
    def fails(trainer, run):
        raise UserError("the judge does not respond")

    tree = online_tree(tmp_path / "run", echo_model)
    with monkeypatch.context() as patch:
        patch.setattr(online, "write_final_evaluation", fails)
        with pytest.raises(UserError, match=r"judge does not respond.*final; repeat .*--resume"):
            run_command("ppo", tree)
    verify_checksums(tmp_path / "run/final")
    run_command("ppo", tree | {"resume": True})
    assert_same_run(runs / "whole", tmp_path / "run")


@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_an_evaluation_that_fails_during_training_costs_no_step(
    tmp_path, echo_model, monkeypatch, error
):
    """The run continues from the step of the evaluation, and repeats no update."""
    keys = {"save_every": 4, "evaluation": {"every": 3, "episodes": 4}}
    run_command("ppo", online_tree(tmp_path / "whole", echo_model, **keys))
    tree = online_tree(tmp_path / "run", echo_model, **keys)

    def fails(*_):
        raise error("the metric failed")

    with monkeypatch.context() as patch:
        patch.setattr(online, "evaluate_held_out", fails)
        with pytest.raises(error, match="the metric failed"):
            run_command("ppo", tree)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-3"]
    run_command("ppo", tree | {"resume": True})
    assert same(checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "run"))
    whole, cut = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "run")
    assert "eval/return" in whole[2]
    assert cut[2] == {k: v for k, v in whole[2].items() if not k.startswith("eval/")}
    assert cut[3] == whole[3]


def test_a_damaged_best_model_of_an_online_run_is_reported_and_replaced(
    tmp_path, echo_model, caplog
):
    keys = {"keep_best": True, "evaluation": {"every": 1, "episodes": 4}}
    tree = online_tree(tmp_path / "run", echo_model, num_steps=2, **keys)
    run_command("ppo", tree)
    best = tmp_path / "run/checkpoints/best"
    (best / "model.safetensors").write_bytes(b"")
    run_command("ppo", tree | {"resume": True, "num_steps": 3})
    assert "best/model.safetensors is damaged" in caplog.text
    assert "the next evaluation counts as the best" in caplog.text
    verify_checksums(best)
    assert same(tensors_of(best), tensors_of(tmp_path / "run/checkpoints/step-3"))


def test_files_of_the_user_stay_where_the_run_replaces_its_own(tmp_path, echo_model):
    """In old checkpoints, in the best model and in the final model, also when the run continues."""
    keys = {"keep_best": True, "keep_last": 1, "evaluation": {"every": 1, "episodes": 4}}
    tree = online_tree(tmp_path / "run", echo_model, num_steps=2, **keys)
    run_command("ppo", tree)
    notes = [
        tmp_path / "run" / folder / "notes/thesis.md"
        for folder in ("checkpoints/step-2", "checkpoints/best", "final", "halted")
    ]
    for path in notes:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    run_command("ppo", tree | {"resume": True, "num_steps": 6})
    assert [path.read_text() for path in notes] == ["mine"] * 4
    step_2 = {path.name for path in (tmp_path / "run/checkpoints/step-2").iterdir()}
    assert step_2 == {"notes", "checksums.json"}
    for path in notes:
        with pytest.raises(UserError, match=r"thesis.md was not written by the toolkit"):
            run_command("ppo", tree | {"overwrite": True})
        path.unlink()
    run_command("ppo", tree | {"overwrite": True})
    assert not (tmp_path / "run/checkpoints/step-6").exists()


def test_an_evaluation_with_a_file_of_the_user_is_not_replaced(tmp_path, echo_model):
    tree = online_tree(tmp_path / "run", echo_model, num_steps=2)
    run_command("ppo", tree)
    plot = tmp_path / "run/evaluation/run/plot.png"
    plot.write_text("mine")
    longer = tree | {"resume": True, "num_steps": 3}
    with pytest.raises(UserError, match=r"plot.png was not written by the toolkit"):
        run_command("ppo", longer)
    assert plot.read_text() == "mine"
    plot.rename(tmp_path / "plot.png")
    run_command("ppo", longer)
    assert len(metrics_of(tmp_path / "run")) == 3


def test_an_ignored_signal_remains_ignored():
    """`nohup` ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignalRecorder() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_the_process():
    with StopSignalRecorder() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT


def test_a_worker_receives_a_signal_to_the_whole_job_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(interrupt, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # set by torchrun
    with StopSignalRecorder() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] = 1.0
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        now[0] = 5.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with StopSignalRecorder() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGTERM


def test_logs_are_on_the_disk_before_the_checkpoint(tmp_path, echo_model, monkeypatch):
    flushed, original = [], loop.save_checkpoint

    def flush(path):
        flushed.append(f"{path.name} {len(path.read_text().splitlines())}")

    def save(folder, trainer, keep):
        assert f"metrics.jsonl {trainer.progress.step}" in flushed
        original(folder, trainer, keep=keep)

    monkeypatch.setattr(directory, "flush_to_disk", flush)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    run_command("ppo", online_tree(tmp_path / "run", echo_model))
    assert "metrics.jsonl 4" in flushed


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_save_and_exit_with_their_code(tmp_path, echo_model, monkeypatch, signal_name):
    number = getattr(signal, signal_name)
    default = signal.default_int_handler if signal_name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(number, default)  # the test may run where signals are ignored (nohup)
    original = OnlineTrainer.step

    def interrupted(trainer, step, run):
        os.kill(os.getpid(), number)
        return original(trainer, step, run)

    monkeypatch.setattr(OnlineTrainer, "step", interrupted)
    tree = tmp_path / "ppo.yaml"
    tree.write_text(str(online_tree(tmp_path / "run", echo_model)))
    try:
        assert main(["ppo", "--config", str(tree)]) == 128 + number
    finally:
        signal.signal(number, before)
    assert (tmp_path / "run/checkpoints/step-1").exists()


def test_a_signal_to_another_process_before_the_first_step_ends_this_one(
    tmp_path, echo_model, monkeypatch
):
    """All processes end before the first step, instead of one that the others then miss."""
    monkeypatch.setattr(World, "first_not_none", lambda world, value: int(signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        run_command("ppo", online_tree(tmp_path / "run", echo_model))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_no_process_ends_after_a_signal_before_the_checkpoint_is_complete(
    tmp_path, echo_model, monkeypatch
):
    """torchrun ends the other processes as soon as one has ended."""
    events, save, step = [], loop.save_checkpoint, OnlineTrainer.step

    def interrupted(trainer, number, run):
        os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, number, run)

    def recorded(folder, trainer, keep):
        save(folder, trainer, keep=keep)
        events.append("saved")

    monkeypatch.setattr(OnlineTrainer, "step", interrupted)
    monkeypatch.setattr(loop, "save_checkpoint", recorded)
    monkeypatch.setattr(World, "barrier", lambda world: events.append("all processes"))
    with pytest.raises(Interrupted):
        run_command("ppo", online_tree(tmp_path / "run", echo_model))
    assert events == ["saved", "all processes"]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_failure_of_an_environment_costs_no_completed_step(
    tmp_path, echo_model, monkeypatch, staleness
):
    """Also between two checkpoints; the run continues when the cause is gone.

    A step has one group, so the episodes of step 3 have the seed 2. With staleness, they are then
    sampled with the policy of step 2.
    """
    rollout = {"max_new_tokens": 3, "max_staleness": staleness}
    keys = {"rollout": rollout, "save_every": 4, "optimizer": {"learning_rate": 1e-2}}
    run_command("grpo", online_tree(tmp_path / "whole", echo_model, **keys))
    tree = online_tree(tmp_path / "cut", echo_model, **keys)
    reset = Echo.reset

    def unreachable(env, *, seed=None, options=None):
        if seed == 2:
            raise ConnectionError("the server of the environment does not answer")
        return reset(env, seed=seed, options=options)

    with monkeypatch.context() as patch:
        patch.setattr(Echo, "reset", unreachable)
        with pytest.raises(UserError, match="seed 2: ConnectionError"):
            run_command("grpo", tree)
    assert [row["step"] for row in metrics_of(tmp_path / "cut")] == [1, 2]
    assert [path.name for path in (tmp_path / "cut/checkpoints").glob("step-*")] == ["step-2"]
    run_command("grpo", tree | {"resume": True})
    assert [row["step"] for row in metrics_of(tmp_path / "cut")] == [1, 2, 3, 4]
    assert checkpoint_of(tmp_path / "cut")["state"]["starts"] == {"count": 4}
    if not staleness:
        assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_weights_that_are_not_finite_are_not_saved_after_a_failure(
    tmp_path, echo_model, monkeypatch
):
    """They can be the cause of the failure, and would replace the last good checkpoint."""
    step = OnlineTrainer.step

    def failing(trainer, number, run):
        if number == 0:
            return step(trainer, number, run)
        trainer.state_is_complete = True
        next(trainer.policy.model.parameters()).data.fill_(math.nan)
        raise UserError("no token can be sampled")

    monkeypatch.setattr(OnlineTrainer, "step", failing)
    with pytest.raises(Halt):
        run_command("ppo", online_tree(tmp_path / "run", echo_model, save_every=4))
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))
