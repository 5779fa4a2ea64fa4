"""Stop, kill, resume: a run that was cut anywhere ends as if it had never been cut."""

import os
import signal

import pytest

from rlhf.cli.main import main
from rlhf.cli.table import run_command
from rlhf.runs.interrupt import Interrupted
from rlhf.training.online import OnlineTrainer
from rlhf.training.supervised import SupervisedTrainer
from rlhf.training.trl.callback import RunCallback
from tests.helpers.command_line import arguments
from tests.helpers.training import (
    assert_same_run,
    metrics_of,
    offline_tree,
    online_tree,
    pair_rows,
    same,
    sft_rows,
    weights_of,
    write_rows,
)

# What is decided by a seed alone, and what an adaptive controller or a moment has to remember.
CASES = {
    "ppo": {
        "kl": {"controller": "adaptive", "target": 0.001, "horizon": 40},
        "shaping": {"scale": "normalize", "missing_eos_penalty": 0.5},
        "algorithm": {"num_epochs": 2, "num_minibatches": 2},
        "critic": "separate",
        "evaluation": {"episodes": 4, "every": 2},
    },
    "dapo": {"algorithm": {"group_size": 4}},
    "ppo_lagrangian": {},
}


def test_same_seed_twice_is_the_same_run_and_another_seed_another(tmp_path, echo_model):
    for name in ("a", "b"):
        run_command("ppo", online_tree(tmp_path / name, echo_model, **CASES["ppo"]))
    run_command("ppo", online_tree(tmp_path / "c", echo_model, seed=1, **CASES["ppo"]))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert metrics_of(tmp_path / "a") != metrics_of(tmp_path / "c")


@pytest.mark.parametrize("command", CASES)
def test_ctrl_c_leaves_a_checkpoint_and_resume_ends_like_the_whole_run(
    tmp_path, echo_model, monkeypatch, capsys, command
):
    run_command(command, online_tree(tmp_path / "whole", echo_model, **CASES[command]))
    original = OnlineTrainer.step

    def interrupted(trainer, step, run):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(trainer, step, run)

    monkeypatch.setattr(OnlineTrainer, "step", interrupted)
    options = arguments(online_tree(tmp_path / "cut", echo_model, **CASES[command]))
    assert main([command, *options]) == 130
    monkeypatch.undo()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "stopped by SIGINT; continue with --resume" in message
    assert {p.name for p in (tmp_path / "cut/checkpoints").iterdir()} == {"step-1", "step-2"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main([command, *options, "--resume"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_second_ctrl_c_stops_at_once(tmp_path, echo_model, monkeypatch, capsys):
    def impatient(trainer, step, run):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second interrupt was ignored")

    monkeypatch.setattr(OnlineTrainer, "step", impatient)
    assert main(["ppo", *arguments(online_tree(tmp_path / "run", echo_model))]) == 130
    assert capsys.readouterr().err == "rlhf: stopped by the user\n"


def test_resuming_a_finished_run_does_nothing(tmp_path, echo_model):
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1)
    run_command("ppo", tree)
    before = (tmp_path / "run/samples.jsonl").read_bytes(), metrics_of(tmp_path / "run")
    run_command("ppo", tree | {"resume": True})
    assert before == ((tmp_path / "run/samples.jsonl").read_bytes(), metrics_of(tmp_path / "run"))


def interrupt_at(step, engine, monkeypatch):
    """Ctrl-C while this step is being done."""
    if engine == "native":
        original_step = SupervisedTrainer.step

        def interrupted(trainer, index, run):
            if index + 1 == step:
                os.kill(os.getpid(), signal.SIGINT)
            return original_step(trainer, index, run)

        monkeypatch.setattr(SupervisedTrainer, "step", interrupted)
        return
    original = RunCallback.on_step_end

    def asked(self, args, state, control, **rest):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, args, state, control, **rest)

    monkeypatch.setattr(RunCallback, "on_step_end", asked)


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("engine", ["native", "trl"])
def test_ctrl_c_in_sft_leaves_a_checkpoint_and_resume_ends_like_the_whole_run(
    tmp_path, echo_model, monkeypatch, capsys, engine, step
):
    data = write_rows(tmp_path / "sft.jsonl", sft_rows())
    run_command("sft", offline_tree(tmp_path / "whole", echo_model, data, engine=engine))
    interrupt_at(step, engine, monkeypatch)
    options = arguments(offline_tree(tmp_path / "cut", echo_model, data, engine=engine))
    assert main(["sft", *options]) == 130
    monkeypatch.undo()
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf:")]
    assert len(message) == 1
    assert "--resume" in message[0]
    name = {"native": "step", "trl": "checkpoint"}[engine]
    assert (tmp_path / f"cut/checkpoints/{name}-{step}").exists()
    assert not (tmp_path / "cut/final").exists()
    assert main(["sft", *options, "--resume"]) == 0
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")


@pytest.mark.parametrize("engine", ["native", "trl"])
@pytest.mark.parametrize("command", ["sft", "dpo", "reward"])
def test_a_row_of_several_steps_is_the_same_after_a_resume_between_them(
    tmp_path, echo_model, monkeypatch, command, engine
):
    """The rows of every third step are means over steps before and after the interruption."""
    rows = sft_rows() if command == "sft" else pair_rows()
    data = write_rows(tmp_path / "rows.jsonl", rows)
    trainer = {"logging_steps": 3, "max_steps": 9}
    common = {"engine": engine, "evaluations": 1, "trainer": trainer}
    run_command(command, offline_tree(tmp_path / "whole", echo_model, data, **common))
    tree = offline_tree(tmp_path / "cut", echo_model, data, **common)
    for step in (4, 5):
        with monkeypatch.context() as patch:
            interrupt_at(step, engine, patch)
            with pytest.raises(Interrupted):
                run_command(command, tree | {"resume": True})
    assert metrics_of(tmp_path / "cut")[-1]["step"] == 3
    run_command(command, tree | {"resume": True})
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
