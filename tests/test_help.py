"""``--help``, ``--print-config`` and ``config.yaml`` state the settings that a run uses."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from rlhf.algorithms.registry import ALGORITHMS, configured_algorithm
from rlhf.cli.main import main
from tests.helpers.command_line import config_file, help_values
from tests.helpers.training import offline_tree, online_tree, sft_rows, write_rows


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


# The values of the papers' rows, written by hand.
KNOWN = {
    "ppo": {"num_epochs": "4", "group_size": "1", "lam": "0.95", "kl_placement": "reward"},
    "grpo": {"group_size": "8", "kl_coef": "0.04", "kl_placement": "loss", "kl_estimator": "k3"},
    "online_dpo": {"group_size": "2", "kl_coef": "0.1", "pair_labels": "soft"},
}


@pytest.mark.parametrize("command", KNOWN)
def test_help_shows_the_settings_of_the_algorithm(capsys, command):
    shown = help_values(capsys, command)
    assert {key: shown[f"algorithm.{key}"] for key in KNOWN[command]} == KNOWN[command]


@pytest.mark.parametrize("command", ALGORITHMS)
def test_help_lists_exactly_the_settings_that_have_an_effect(capsys, command):
    shown = {key for key in help_values(capsys, command) if key.startswith("algorithm.")}
    assert shown == {f"algorithm.{key}" for key in ALGORITHMS[command].settings_with_effect}


def test_help_of_several_steps_lists_the_clipping(capsys):
    assert "algorithm.clip_low" not in help_values(capsys, "grpo")
    shown = help_values(capsys, "grpo", "--algorithm.num_minibatches", "4")
    assert shown["algorithm.clip_low"] == "0.2"
    assert shown["algorithm.num_minibatches"] == "4"


def test_help_hides_the_critic_where_there_is_none(capsys):
    assert "critic" in help_values(capsys, "ppo")
    assert "critic" not in help_values(capsys, "grpo")


@pytest.mark.parametrize(
    ("command", "rate"), [("sft", "2e-05"), ("reward", "2e-05"), ("dpo", "1e-06"), ("kto", "1e-06")]
)
def test_help_of_offline_stages_shows_the_learning_rate_and_epochs_in_force(capsys, command, rate):
    shown = help_values(capsys, command)
    assert shown["trainer.learning_rate"] == rate
    assert float(shown["trainer.num_train_epochs"]) == 1  # TRL's own default is 3
    assert "trainer.bf16" not in shown  # set by model.dtype
    assert "trainer.hub_model_id" not in shown


def test_options_of_trl_are_listed_on_request(capsys):
    assert "trainer.neftune_noise_alpha" not in help_values(capsys, "sft")
    shown = help_values(capsys, "sft", "--engine", "trl")
    assert "trainer.neftune_noise_alpha" in shown
    assert shown["trainer.learning_rate"] == "2e-05"


def test_help_has_a_usage_line_and_required_keys_first(capsys):
    for command in ("ppo", "sft", "generate", "score", "evaluate"):
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"usage: rlhf {command} [--config FILE ...]" in text
    assert main(["sft", "--help"]) == 0
    text = capsys.readouterr().out
    required = text.partition("Required:")[2].partition("\n\n")[0]
    assert re.findall(r"--(\S+)", required) == ["output_dir", "data"]


@pytest.mark.parametrize("command", ["ppo", "grpo", "online_dpo", "ppo_lagrangian", "best_of_n"])
def test_print_config_holds_every_setting_that_has_an_effect(capsys, tmp_path, command):
    tree = online_tree(tmp_path / "run", tmp_path)
    tree["algorithm"] = {}
    tree["episodes_per_step"] = 8
    shown = printed_config(capsys, command, "--config", config_file(tmp_path / "c.yaml", tree))
    row = ALGORITHMS[command]
    assert shown["algorithm"] == {
        key: getattr(row.settings, key) for key in row.settings_with_effect
    }


def test_a_recorded_configuration_is_taken_back_with_overrides(capsys, tmp_path):
    tree = online_tree(tmp_path / "run", tmp_path)
    tree["algorithm"] = {"clip_low": 0.1}
    tree["episodes_per_step"] = 8
    record = printed_config(capsys, "ppo", "--config", config_file(tmp_path / "c.yaml", tree))
    again = config_file(tmp_path / "record.yaml", record)
    assert printed_config(capsys, "ppo", "--config", again) == record
    # Settings that keep their default may lose their effect; one that was set may not.
    one_step = ["--algorithm.num_epochs", "1", "--algorithm.num_minibatches", "1"]
    assert main(["ppo", "--config", again, *one_step, "--print-config"]) == 2
    assert "clip_low has no effect" in capsys.readouterr().err
    del record["algorithm"]["clip_low"]
    again = config_file(tmp_path / "record.yaml", record)
    shown = printed_config(capsys, "ppo", "--config", again, *one_step)
    expected = configured_algorithm("ppo", num_epochs=1, num_minibatches=1).settings_with_effect
    assert shown["algorithm"].keys() == expected


def test_the_run_records_what_it_used(tmp_path, echo_model):
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    tree = offline_tree(tmp_path / "run", echo_model, data)
    tree["trainer"] = {"max_steps": 1}
    assert main(["sft", "--config", config_file(tmp_path / "c.yaml", tree)]) == 0
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert record["trainer"]["learning_rate"] == 2e-5
    assert record["trainer"]["max_steps"] == 1
    assert record["trainer"]["max_grad_norm"] == 1.0


@pytest.mark.parametrize(
    ("command", "key", "right"),
    [
        ("sft", "learning_rate", "'trainer.learning_rate'"),
        ("ppo", "learning_rate", "'optimizer.learning_rate'"),
        ("ppo", "max_new_tokens", "'rollout.max_new_tokens'"),
        ("ppo", "group_size", "'algorithm.group_size'"),
        ("ppo", "optimizer.kl_coef", "'algorithm.kl_coef'"),
        ("dpo", "model.beta", "'trainer.beta'"),
        ("evaluate", "temprature", "temperature'"),
    ],
)
def test_a_key_of_the_wrong_section_is_told_the_right_one(capsys, command, key, right):
    assert main([command, "--output_dir", "x", f"--{key}", "1"]) == 2
    assert right in capsys.readouterr().err


def test_a_closed_pipe_is_quiet():
    code = (
        "import os, sys, subprocess\n"
        f"child = subprocess.Popen([{sys.executable!r}, '-m', 'rlhf', 'sft', '--help'], "
        "stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
        "child.stdout.close()\n"
        "err = child.stderr.read().decode()\n"
        "print(child.wait(), repr(err))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["141", "''\n"]
