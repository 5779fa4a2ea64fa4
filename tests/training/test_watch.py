"""Warnings while a run trains: each kind once, none for noise, the same words as in the report."""

import logging
import random
import sys
from types import SimpleNamespace

import pytest
import transformers

from rlhf.cli.table import run_command
from rlhf.runs.diagnostics import TrainingMonitor
from rlhf.runs.directory import Run
from rlhf.runs.interrupt import StopSignalRecorder
from rlhf.training.supervised import SupervisedTrainer
from rlhf.training.trl.callback import RunCallback
from tests.helpers.training import metrics_of, offline_tree, online_tree, sft_rows, write_rows


def told(folder, columns, **config):
    """(step, sentence) of every warning while these columns are logged."""
    watch = TrainingMonitor(folder, config)
    length = len(next(iter(columns.values())))
    return [
        (step, words)
        for step in range(length)
        for words in watch.update(step, {key: values[step] for key, values in columns.items()})
    ]


@pytest.mark.parametrize(
    ("columns", "step", "words"),
    [
        ({"policy/kl": [1.0, 150.0, 200.0, 300.0]}, 1, "policy/kl reached 150 (first above 100"),
        ({"policy/ratio_max": [1.0, 1.0, 30.0, 50.0]}, 2, "policy/ratio_max reached 30"),
        ({"eval/loss": [1.0, 0.8, 0.9, 1.0]}, 2, "the held-out loss rose from 0.8 at step 1"),
        ({"train/loss": [1.0, float("nan"), float("nan")]}, 1, "train/loss is not finite"),
        (
            {"rollout/length_limited": [0.5] * 9},
            4,
            "50% of replies hit the token limit over the last 5",
        ),
        ({"rollout/invalid": [2.0] * 9}, 4, "200% of actions were invalid over the last 5"),
        ({"reward/unscored": [0.01] * 9}, 4, "1% of episodes could not be scored over the last"),
        ({"rollout/missing_eos": [0.3] * 9}, 4, "30% of replies have no stop token over the last"),
    ],
)
def test_each_kind_is_told_once_at_its_step(tmp_path, columns, step, words):
    ((when, sentence),) = told(tmp_path, columns)
    assert when == step
    assert sentence.startswith(words)


def test_kinds_are_told_apart(tmp_path):
    columns = {"policy/kl": [1.0, 150.0, 200.0], "policy/ratio_max": [1.0, 1.0, 30.0]}
    assert [step for step, _ in told(tmp_path, columns)] == [1, 2]


def test_a_metric_full_of_nans_is_one_warning(tmp_path):
    nan = [float("nan")] * 3
    assert len(told(tmp_path, {"value/loss": nan, "policy/loss": nan})) == 1


def test_lost_entropy_is_told_unless_something_was_learned(tmp_path):
    entropy = [2.0] * 5 + [0.01] * 15
    ((step, words),) = told(tmp_path, {"policy/entropy": entropy, "reward/mean": [0.3] * 20})
    assert step == 9
    assert "policy/entropy fell from 2 to 0.01 and the reward did not rise" in words
    rising = [0.3 + 0.02 * i for i in range(20)]
    assert told(tmp_path, {"policy/entropy": entropy, "reward/mean": rising}) == []
    rounded = [0.3] * 5 + [0.3 + 1e-9] * 15  # as in the other conditions, this is no rise
    ((_, words),) = told(tmp_path, {"policy/entropy": entropy, "reward/mean": rounded})
    assert "the reward did not rise" in words
    repetition = {"rollout/repetition": [0.1] * 5 + [0.9] * 15}
    assert len(told(tmp_path, repetition | {"reward/mean": rounded})) == 1
    assert told(tmp_path, repetition | {"reward/mean": rising}) == []
    low = {"policy/entropy": [0.05] * 5 + [0.001] * 15, "reward/mean": [1.0] * 20}
    assert told(tmp_path, low) == []


def noisy(means, seed, size=1.0):
    rng = random.Random(seed)
    return [mean + rng.gauss(0, size) for mean in means]


def test_falling_gold_is_told_once_while_the_reward_rises(tmp_path):
    up = [i / 5 for i in range(100)]
    gold = [10 - abs(i / 2.5 - 10) for i in range(100)]  # turns at step 25, far below at 100
    for seed in range(5):
        columns = {"reward/mean": noisy(up, seed), "reward/gold": noisy(gold, 50 + seed)}
        ((step, words),) = told(tmp_path, columns)
        assert 25 < step < 60
        assert words.startswith("the gold score fell from")


@pytest.mark.parametrize("rise", [0.0, 0.02, 0.1])
def test_noise_that_is_looked_at_after_every_step_is_no_fall(tmp_path, rise):
    """Without care 9 in 10 of these runs warn: a noisy curve always dips below its peak once."""
    warned = 0
    for seed in range(40):
        means = [rise * i for i in range(60)]
        columns = {"reward/mean": noisy(means, seed), "reward/env": noisy(means, 1000 + seed)}
        warned += bool(told(tmp_path, columns))
    assert warned <= 2


def test_a_resumed_run_is_judged_with_its_earlier_rows(tmp_path):
    write_rows(
        tmp_path / "metrics.jsonl", [{"step": i, "rollout/length_limited": 0.5} for i in range(4)]
    )
    watch = TrainingMonitor(tmp_path, {})
    assert len(watch.update(4, {"rollout/length_limited": 0.5})) == 1


def test_watching_stays_cheap(tmp_path, monkeypatch):
    looks = []
    module = sys.modules[TrainingMonitor.__module__]  # its package has a function of the same name
    monkeypatch.setattr(module, "metric_warnings", lambda *_: looks.append(1) or ())
    watch = TrainingMonitor(tmp_path, {})
    for step in range(10_000):
        watch.update(step, {"policy/kl": 0.0})
    assert len(looks) < 500


def test_an_online_run_warns_once_in_its_log(tmp_path, echo_model, caplog):
    tree = online_tree(tmp_path / "run", echo_model, num_steps=8)
    tree["rollout"] = {**tree.get("rollout", {}), "max_new_tokens": 1}
    with caplog.at_level(logging.INFO):
        run_command("ppo", tree)
    assert all(
        row["rollout/length_limited"] > 0.1 for row in metrics_of(tmp_path / "run") if row["step"]
    )
    lines = [r.getMessage() for r in caplog.records if "warning, step" in r.getMessage()]
    assert [line for line in lines if "hit the token limit" in line] == [
        "run: warning, step 5: 100% of replies hit the token limit over the last 5 logged steps."
    ]


def test_an_offline_run_warns_when_held_out_loss_rises(tmp_path, echo_model, caplog, monkeypatch):
    losses = iter([2.0, 1.0, 1.2, 1.5, 1.8, 2.0])
    monkeypatch.setattr(SupervisedTrainer, "evaluate", lambda trainer: {"eval/loss": next(losses)})
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    with caplog.at_level(logging.INFO):
        run_command("sft", offline_tree(tmp_path / "run", echo_model, data))
    lines = [r.getMessage() for r in caplog.records if "warning, step" in r.getMessage()]
    assert len(lines) == 1
    assert "held-out loss rose from 1 at step 2 to 1.2" in lines[0]


def test_the_trainers_last_evaluation_can_warn(tmp_path, caplog):
    """Trainers log after the step's end, and after the last step there is no other."""
    recorder = RunCallback(Run(tmp_path), StopSignalRecorder())
    state, control = SimpleNamespace(max_steps=3, global_step=0), transformers.TrainerControl()
    with caplog.at_level(logging.INFO):
        recorder.on_log(None, state, control, logs={"eval_loss": 1.0})
        recorder.on_train_begin(None, state, control)
        for loss in (0.5, 0.51, 0.9):
            state.global_step += 1
            recorder.on_step_end(None, state, control)
            recorder.on_log(None, state, control, logs={"eval_loss": loss, "noise": "x"})
        recorder.close()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "step 3: the held-out loss rose from 0.5 at step 1 to 0.9" in warning


@pytest.mark.parametrize(
    ("keys", "moved", "words"),
    [
        (
            {"optimizer": {"learning_rate": 1e-30}},
            0.05,
            "the policy did not change: policy/kl is 0",
        ),
        ({"critic_warmup_steps": 6}, 0.0, "training did not change the model: at step 6"),
    ],
)
def test_a_run_that_does_not_move_is_told_in_its_page(tmp_path, echo_model, keys, moved, words):
    """At the rate of 1e-30 one tensor moves: the embedding's row of padding, which starts at 0."""
    run_command("ppo", online_tree(tmp_path / "run", echo_model, num_steps=6, **keys))
    assert [row["train/moved"] for row in metrics_of(tmp_path / "run")] == [moved] * 6
    assert words in (tmp_path / "run/report.html").read_text()


def test_a_model_that_did_not_move_is_told_after_its_warm_up(tmp_path):
    columns = {"train/updates": [1.0] * 12, "train/moved": [0.0] * 12}
    ((step, words),) = told(tmp_path, columns, critic_warmup_steps=3)
    assert step == 8  # five steps after the critic's own
    assert words.startswith("training did not change the model")
    later = columns | {"train/moved": [0.0] * 5 + [1.0] * 7}
    assert not told(tmp_path, later, critic_warmup_steps=3)
    assert [step for step, _ in told(tmp_path, {"train/moved": [0.0] * 3})] == [1]
