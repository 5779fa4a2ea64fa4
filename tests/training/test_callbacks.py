"""Callbacks of every trainer: when they are called, what they can change, and their state."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from rlhf.cli.table import run_command
from rlhf.errors import UserError
from rlhf.plugins import Callback, TrainingEvent
from rlhf.reports import write_report
from rlhf.runs.callbacks import make_callback
from tests.helpers.training import (
    label_rows,
    metrics_of,
    offline_tree,
    online_tree,
    pair_rows,
    same,
    sft_rows,
    weights_of,
    write_rows,
)

HERE = __name__
STOP_AT = str(Path(__file__).resolve().parents[2] / "examples" / "plugins" / "callback.py")


class Recorder(Callback):
    """Records its calls."""

    calls: ClassVar[list[tuple[str, int, bool, str]]] = []

    def record(self, point: str, event: TrainingEvent) -> None:
        assert event.model is not None
        assert event.tokenizer is not None
        assert event.run.directory.exists()
        if event.folder:
            assert any(event.folder.glob("*.safetensors"))
        name = event.folder.name if event.folder else ""
        Recorder.calls.append((point, event.step, bool(event.metrics), name))

    def on_step(self, event: TrainingEvent) -> None:
        self.record("step", event)

    def on_evaluation(self, event: TrainingEvent) -> None:
        assert any(key.startswith("eval/") for key in event.metrics)
        self.record("evaluation", event)

    def on_checkpoint(self, event: TrainingEvent) -> None:
        self.record("checkpoint", event)

    def on_end(self, event: TrainingEvent) -> None:
        self.record("end", event)


@pytest.fixture
def calls() -> list[tuple[str, int, bool, str]]:
    Recorder.calls.clear()
    return Recorder.calls


def stop_after_two(event: TrainingEvent, *, steps: int = 2) -> None:
    if event.step == steps:
        event.stop()


def fail_at_three(event: TrainingEvent) -> None:
    if event.step == 3:
        raise KeyError("loss")


def test_the_calls_of_an_online_run(tmp_path, echo_model, calls):
    tree = online_tree(
        tmp_path / "run",
        echo_model,
        num_steps=4,
        save_every=2,
        evaluation={"every": 2, "episodes": 4},
        callbacks=[f"{HERE}:Recorder"],
    )
    run_command("ppo", tree)
    assert calls == [
        ("step", 1, True, ""),
        ("step", 2, True, ""),
        ("evaluation", 2, True, ""),
        ("checkpoint", 2, False, "step-2"),
        ("step", 3, True, ""),
        ("step", 4, True, ""),
        ("evaluation", 4, True, ""),
        ("checkpoint", 4, False, "step-4"),
        ("end", 4, False, "final"),
    ]
    calls.clear()
    run_command("ppo", tree | {"resume": True})
    assert calls == []  # the run is finished


ROWS = {"sft": sft_rows, "dpo": pair_rows, "reward": pair_rows, "kto": label_rows}


@pytest.mark.parametrize(
    ("command", "engine"),
    [("sft", "native"), ("dpo", "native"), ("reward", "native"), ("sft", "trl"), ("kto", "trl")],
)
def test_the_calls_of_an_offline_run(tmp_path, echo_model, calls, command, engine):
    data = write_rows(tmp_path / "rows.jsonl", ROWS[command]())
    tree = offline_tree(tmp_path / "run", echo_model, data, engine=engine, evaluations=2)
    tree["trainer"] = {"max_steps": 4, "learning_rate": 1e-3, "logging_steps": 2}
    run_command(command, tree | {"callbacks": [f"{HERE}:Recorder"]})
    prefix = "step" if engine == "native" else "checkpoint"
    assert calls == [
        ("step", 1, False, ""),
        ("step", 2, True, ""),
        ("evaluation", 2, True, ""),
        ("checkpoint", 2, False, f"{prefix}-2"),
        ("step", 3, False, ""),
        ("step", 4, True, ""),
        ("evaluation", 4, True, ""),
        ("checkpoint", 4, False, f"{prefix}-4"),
        ("end", 4, False, "final"),
    ]


@pytest.mark.parametrize("engine", ["online", "native", "trl"])
def test_a_callback_ends_training_and_the_model_is_saved(tmp_path, echo_model, engine):
    callback = {"callback": f"{HERE}:stop_after_two", "steps": 2}
    if engine == "online":
        run_command("rloo", online_tree(tmp_path / "run", echo_model, callbacks=[callback]))
    else:
        data = write_rows(tmp_path / "rows.jsonl", sft_rows())
        tree = offline_tree(tmp_path / "run", echo_model, data, engine=engine)
        run_command("sft", tree | {"callbacks": [callback]})
    assert max(row["step"] for row in metrics_of(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "finished").exists()
    assert weights_of(tmp_path / "run")


class StopsOnce(Callback):
    """Ends training at step 2; the process then ends before the run is finished."""

    point: ClassVar[str] = ""
    failed: ClassVar[bool] = False

    def on_step(self, event: TrainingEvent) -> None:
        self.stop_at(event, "step")

    def on_checkpoint(self, event: TrainingEvent) -> None:
        self.stop_at(event, "checkpoint")

    def stop_at(self, event: TrainingEvent, point: str) -> None:
        if event.step == 2 and point == StopsOnce.point and not StopsOnce.failed:
            event.stop()

    def on_end(self, event: TrainingEvent) -> None:
        if not StopsOnce.failed:
            StopsOnce.failed = True
            raise RuntimeError("killed")


@pytest.mark.parametrize("point", ["step", "checkpoint"])
@pytest.mark.parametrize("engine", ["online", "native", "trl"])
def test_a_resumed_run_takes_no_step_after_a_callback_ended_training(
    tmp_path, echo_model, engine, point
):
    StopsOnce.point, StopsOnce.failed = point, False
    if engine == "online":
        command, tree = "rloo", online_tree(tmp_path / "run", echo_model, save_every=2)
    else:
        data = write_rows(tmp_path / "rows.jsonl", sft_rows())
        command, tree = "sft", offline_tree(tmp_path / "run", echo_model, data, engine=engine)
        tree["trainer"] |= {"logging_steps": 1}
    tree["callbacks"] = [f"{HERE}:StopsOnce"]
    with pytest.raises(UserError, match="StopsOnce failed in on_end at step 2"):
        run_command(command, tree)
    weights = weights_of(tmp_path / "run")
    run_command(command, tree | {"resume": True})
    assert max(row["step"] for row in metrics_of(tmp_path / "run")) == 2
    assert same(weights, weights_of(tmp_path / "run"))


def test_a_resumed_run_of_trl_takes_no_step_after_the_last_one(tmp_path, echo_model):
    """The last step is not the last one of an epoch, which has four."""
    StopsOnce.point, StopsOnce.failed = "", False
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    tree = offline_tree(tmp_path / "run", echo_model, data, engine="trl", evaluations=2)
    tree |= {"trainer": {"max_steps": 6, "logging_steps": 1}, "callbacks": [f"{HERE}:StopsOnce"]}
    with pytest.raises(UserError, match="StopsOnce failed in on_end at step 6"):
        run_command("sft", tree)
    run_command("sft", tree | {"resume": True})
    assert max(row["step"] for row in metrics_of(tmp_path / "run")) == 6


def test_a_callback_that_only_reads_changes_nothing(tmp_path, echo_model, calls):
    for name, callbacks in (("plain", []), ("watched", [f"{HERE}:Recorder"])):
        tree = online_tree(tmp_path / name, echo_model, num_steps=2, callbacks=callbacks)
        run_command("ppo", tree)
    assert same(weights_of(tmp_path / "plain"), weights_of(tmp_path / "watched"))
    assert metrics_of(tmp_path / "plain") == metrics_of(tmp_path / "watched")


@pytest.mark.parametrize("engine", ["online", "trl"])
def test_the_state_of_a_callback_is_resumed(tmp_path, echo_model, engine):
    """Four evaluations over two processes; the run fails between step 2 and 4."""
    entry = {"callback": "stop_at", "value": 1e9, "metric": "eval/return"}
    more: dict[str, Any] = {"plugins": [STOP_AT]}
    if engine == "online":
        command = "rloo"
        tree = online_tree(tmp_path / "run", echo_model, evaluation={"every": 1, "episodes": 4})
    else:
        command, entry["metric"] = "sft", "eval/loss"
        data = write_rows(tmp_path / "rows.jsonl", sft_rows())
        tree = offline_tree(tmp_path / "run", echo_model, data, engine="trl")
        tree["trainer"] = {"max_steps": 4, "learning_rate": 1e-3}
    fragile = tree | more | {"callbacks": [entry, f"{HERE}:fail_once"]}
    fail_once.failed = False
    with pytest.raises(UserError, match=r"callback .*fail_once failed in on_step at step 3"):
        run_command(command, fragile)
    run_command(command, fragile | {"resume": True})
    counts = {
        row["step"]: row["callback/evaluations"]
        for row in metrics_of(tmp_path / "run")
        if "callback/evaluations" in row
    }
    assert counts == {1: 1, 2: 2, 3: 3, 4: 4}


def fail_once(event: TrainingEvent) -> None:
    if event.step == 3 and not fail_once.failed:
        fail_once.failed = True
        raise RuntimeError("broken once")


fail_once.failed = False  # type: ignore[attr-defined]


def test_an_error_names_the_callback_the_file_and_the_line(tmp_path, echo_model):
    tree = online_tree(tmp_path / "run", echo_model, callbacks=[f"{HERE}:fail_at_three"])
    message = r"fail_at_three failed in on_step at step 3: KeyError: 'loss' \(test_callbacks.py:\d+"
    with pytest.raises(UserError, match=message):
        run_command("ppo", tree)
    assert (tmp_path / "run" / "checkpoints" / "step-2").exists()


class Misspelled(Callback):
    def on_steps(self, event: TrainingEvent) -> None: ...


class NeedsAnArgument(Callback):
    def __init__(self, path: str) -> None: ...


class NeedsNoEvent(Callback):
    def on_end(self) -> None: ...  # type: ignore[override]


class Asynchronous(Callback):
    async def on_step(self, event: TrainingEvent) -> None: ...  # type: ignore[override]


async def asynchronous(event: TrainingEvent) -> None: ...


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            f"{HERE}:NeedsNoEvent",
            r"on_end \(test_callbacks.py:\d+\) has the wrong signature",
        ),
        (f"{HERE}:Asynchronous", r"on_step \(test_callbacks.py:\d+\) is defined with async def"),
        (f"{HERE}:asynchronous", r"\(test_callbacks.py:\d+\) is defined with async def"),
        (f"{HERE}:Misspelled", "has a method on_steps, which is never called; did you mean 'on_st"),
        (f"{HERE}:NeedsAnArgument", r"NeedsAnArgument cannot be made: TypeError: .*'path'"),
        (f"{HERE}:HERE", "must be a function, or a subclass of rlhf.Callback"),
        (f"{HERE}:Path", "must be a function, or a subclass of rlhf.Callback"),
        ("unknown", "unknown callback 'unknown'"),
        ({"value": 1}, "expected a name, file.py:name or"),
        (3, "expected a name"),
    ],
)
def test_a_wrong_callback_is_refused(entry, message):
    with pytest.raises(UserError, match=message):
        make_callback(entry)


def log_numbers(event: TrainingEvent) -> None:
    event.log({"mine/a": torch.tensor(1.5), "mine/b": np.float32(2.5), "mine/c": True})


def test_numbers_of_any_type_are_logged(tmp_path, echo_model):
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1, callbacks=[f"{HERE}:log_numbers"])
    run_command("ppo", tree)
    (row,) = [row for row in metrics_of(tmp_path / "run") if "mine/a" in row]
    assert (row["mine/a"], row["mine/b"], row["mine/c"]) == (1.5, 2.5, 1.0)
    assert "<b>mine/a</b>" in write_report(tmp_path / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"mine/a": "1"}, "mine/a must be a number, got str"),
        ({"mine/a": None}, "mine/a must be a number, got NoneType"),
        ({"mine/a": torch.ones(2)}, "mine/a must be a number, got Tensor"),
        ({"reward/mean": 1.0}, "'reward/mean' is a metric of the run: choose another name"),
        ({"step": 7}, "'step' is a metric of the run"),
        ([("mine/a", 1.0)], "give a mapping, got list"),
    ],
)
def test_other_metrics_are_refused(metrics, message):
    event = TrainingEvent(None, 1, 2, None, None, {"reward/mean": 0.5})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"event.log: {message}"):
        event.log(metrics)


def freeze(event: TrainingEvent) -> None:
    event.model.requires_grad_(False)


def test_weights_without_a_gradient_are_named(tmp_path, echo_model):
    tree = online_tree(tmp_path / "run", echo_model, callbacks=[f"{HERE}:freeze"])
    with pytest.raises(UserError, match=r"the loss has no gradient.*requires_grad"):
        run_command("rloo", tree)


def change_the_process(event: TrainingEvent) -> None:
    os.chdir("/")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    event.model.eval()


def test_a_callback_does_not_change_the_process(tmp_path, echo_model, monkeypatch):
    """The relative paths of the run stay valid, and later steps compute gradients."""
    monkeypatch.chdir(tmp_path)
    for name, callbacks in (("plain", []), ("changed", [f"{HERE}:change_the_process"])):
        run_command("ppo", online_tree(Path(name), echo_model, callbacks=callbacks, num_steps=2))
    assert torch.is_grad_enabled()
    assert same(weights_of(tmp_path / "plain"), weights_of(tmp_path / "changed"))


def test_a_changed_callback_is_not_resumed(tmp_path, echo_model):
    path = tmp_path / "mine.py"
    path.write_text("def watch(event):\n    pass\n")
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1, callbacks=[f"{path}:watch"])
    run_command("ppo", tree)
    assert "callbacks.0" in json.loads((tmp_path / "run" / "inputs.json").read_text())
    path.write_text("def watch(event):\n    event.stop()\n")
    with pytest.raises(UserError, match=r"the content of callbacks.0 .* has changed"):
        run_command("ppo", tree | {"resume": True})
