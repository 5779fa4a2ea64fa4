"""Plug-ins: parts from files outside the package, found, used, recorded and refused like ours."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS, run_command
from rlhf.common.files import write_jsonl
from rlhf.common.plugins import load_plugins, resolve_code_references
from rlhf.common.registry import Registry
from rlhf.config.data import DataSpec
from rlhf.config.load import assemble_tree_and_load_plugins
from rlhf.data import load
from rlhf.errors import UserError
from rlhf.reward_models import build
from rlhf.training.plan.memory import optimizer_bytes
from tests.helpers.training import (
    assert_same_run,
    metrics_of,
    offline_tree,
    online_tree,
    pairs_tree,
    same,
    sft_rows,
    weights_of,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ROOT / "examples" / "plugins"


def plugin(name: str) -> list[str]:
    return [str(PLUGINS / f"{name}.py")]


def write_config(path: Path, tree: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.parametrize("path", sorted(PLUGINS.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_at_most_30_lines_and_states_the_interface(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30
    assert "plugin_api = 1" in lines
    load_plugins([str(path)])


# Use of each part


def test_an_algorithm_is_a_command_in_listings_and_help(capsys, tmp_path):
    option = ["--plugins", *plugin("algorithm")]
    assert main(["--help", *option]) == 0
    training = capsys.readouterr().out.partition("Training")[2].partition("\n\n")[0]
    assert "topr" in training
    assert main(["algorithms", *option]) == 0
    assert "algorithm.py" in capsys.readouterr().out
    assert main(["topr", "--help", *option]) == 0
    text = capsys.readouterr().out
    assert "--algorithm.group_size INT>=1 = 4" in text
    assert "--algorithm.clip_low" not in text  # the loss does not read it


def test_an_algorithm_trains_from_a_file_beside_the_configuration(
    capsys, tmp_path, monkeypatch, echo_model
):
    """The command is known only by the plug-in; the working directory has no files."""
    text = (PLUGINS / "algorithm.py").read_text()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mine.py").write_text(text)
    tree = online_tree(tmp_path / "run", echo_model, plugins=["mine.py"], num_steps=2)
    config = write_config(tmp_path / "study" / "topr.yaml", tree)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["topr", "--config", config]) == 0, capsys.readouterr().err
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["plugins"] == [str(tmp_path / "study" / "mine.py")]
    assert recorded["algorithm"]["num_epochs"] == 2
    assert "clip_low" not in recorded["algorithm"]
    assert "plugins.0" in json.loads((tmp_path / "run" / "inputs.json").read_text())


def test_the_loss_of_the_example_by_hand():
    """Ratios 2 and 1/2 with advantages 1 and -1: (-1 * log 2 + 1/2 * log 1/2) / 2 tokens."""
    from tests.algorithms.batches import batch_of

    load_plugins(plugin("algorithm"))
    batch = batch_of(torch.ones(2, 1, dtype=torch.bool), old_logprobs=torch.zeros(2, 1))
    import dataclasses

    mask = torch.ones(2, 1, dtype=torch.bool)
    batch = dataclasses.replace(batch, advantages=torch.tensor([[1.0], [-1.0]]), loss_mask=mask)
    row = ALGORITHMS["topr"]
    logprobs = torch.tensor([[2.0], [0.5]]).log()
    loss, _ = row.policy_loss.function(logprobs, batch, row.settings, denominator=2)
    by_hand = (-torch.tensor(2.0).log() + 0.5 * torch.tensor(0.5).log()) / 2
    assert loss.item() == pytest.approx(by_hand.item())


def test_an_advantage_and_a_kl_estimator_train(tmp_path, echo_model):
    tree = online_tree(tmp_path / "run", echo_model, plugins=plugin("advantage"), num_steps=1)
    run_command("sign_reinforce", tree)
    (row,) = [row for row in metrics_of(tmp_path / "run") if "policy/kl_in_loss" in row]
    assert row["policy/kl_in_loss"] == pytest.approx(0, abs=1e-6)  # the policy is the reference


def test_a_reward_checks_the_types_of_its_settings():
    load_plugins(plugin("reward"))
    talk = [[{"role": "assistant", "content": "apple Apple"}]]
    assert build({"kind": "brevity", "limit": 10})(talk) == [0.0]
    assert build({"kind": "brevity"})(talk) == [1.0]
    assert build({"kind": "keyword", "word": "apple"})(talk) == [2.0]
    assert build({"kind": "keyword", "word": "apple", "ignore_case": False})(talk) == [1.0]
    for spec, message in (
        ({"kind": "brevity", "limit": "many"}, "limit must be of type"),
        ({"kind": "brevity", "limits": 3}, "did you mean 'limit'"),
        ({"kind": "keyword"}, "needs the setting 'word'"),
        ({"kind": "brevit"}, "did you mean 'brevity'"),
    ):
        with pytest.raises(UserError, match=message):
            build(spec)


@pytest.mark.parametrize("concurrency", ["lockstep", "processes"])
@pytest.mark.parametrize("env_id", ["mine/HotOrCold-v0", "environment.py:HotOrCold"])
def test_an_environment_also_in_worker_processes(tmp_path, echo_model, concurrency, env_id):
    named = "environment.py" in env_id
    tree = online_tree(
        tmp_path / "run",
        echo_model,
        plugins=[] if named else plugin("environment"),
        env={"id": f"{PLUGINS}/{env_id}" if named else env_id, "concurrency": concurrency},
        rewards=[],
        num_steps=1,
    )
    run_command("ppo", tree)
    rows = metrics_of(tmp_path / "run")
    assert 1 <= rows[0]["rollout/turns"] <= 4
    summary = json.loads((tmp_path / "run/evaluation/run/summary.json").read_text())
    assert summary["env"] == env_id


def test_an_environment_is_listed_and_checked(capsys):
    option = ["--plugins", *plugin("environment")]
    assert main(["envs", "list", "--json", *option]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["mine/HotOrCold-v0"]["horizon"] == 4
    assert rows["mine/HotOrCold-v0"]["source"] == str(PLUGINS / "environment.py")
    assert main(["envs", "check", "mine/HotOrCold-v0", *option]) == 0, capsys.readouterr().out


def test_an_optimizer_in_both_trainers(tmp_path, echo_model):
    """A step of signSGD from the same gradient has the same size in every weight."""
    tree = online_tree(
        tmp_path / "ppo",
        echo_model,
        plugins=plugin("optimizer"),
        optimizer={"name": "sign_sgd", "schedule": "constant"},
        num_steps=1,
        algorithm={"num_epochs": 1},
    )
    run_command("ppo", tree)
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    sft = offline_tree(tmp_path / "sft", echo_model, data, plugins=plugin("optimizer"))
    sft["trainer"] = {"optim": "sign_sgd", "max_steps": 1, "learning_rate": 2.0**-10}
    sft["trainer"] |= {"lr_scheduler_type": "constant"}
    run_command("sft", sft | {"evaluations": 1})
    from tests.helpers.training import tensors_of

    before, after = tensors_of(echo_model), weights_of(tmp_path / "sft")
    moved = {
        round(float(abs(after[k] - before[k]).max()) * 2**10, 3)
        for k in before
        if k in after and not torch.equal(after[k], before[k])
    }
    assert moved == {1.0}


def test_a_dry_run_with_an_optimizer_of_a_plugin(capsys, tmp_path, echo_model):
    """Its state is assumed to have two moments, as that of AdamW."""
    tree = online_tree(
        tmp_path / "run",
        echo_model,
        plugins=plugin("optimizer"),
        optimizer={"name": "sign_sgd"},
    )
    assert main(["ppo", "--config", write_config(tmp_path / "c.yaml", tree), "--dry-run"]) == 0
    assert "optimizer state" in capsys.readouterr().out
    assert optimizer_bytes("sign_sgd", [torch.zeros(10)]) == 2 * 10 * 4


def test_a_tracker(tmp_path, echo_model):
    data = write_rows(tmp_path / "rows.jsonl", sft_rows(8))
    more = {"plugins": plugin("tracker"), "track": ["csv"]}
    run_command("sft", offline_tree(tmp_path / "run", echo_model, data, **more))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        steps = {int(step) for step, *_ in csv.reader(file)}
    assert steps == {row["step"] for row in metrics_of(tmp_path / "run")}


def test_a_data_format_comes_first_and_is_named_in_the_summary(tmp_path):
    load_plugins(plugin("data_format"))
    path = tmp_path / "exam.jsonl"
    row = {"task": "2 + 2?", "gold": "4", "wrong": ["5", "22"], "page": 7}
    write_jsonl(path, [row])
    loaded = load(DataSpec(str(path)), "preference", seed=None)
    assert [row["rejected"][0]["content"] for row in loaded.rows] == ["5", "22"]
    assert "read as exam" in loaded.summary()
    assert "columns not used: page" in loaded.summary()
    assert load(DataSpec(str(path)), "sft", seed=0).rows[0]["completion"][0]["content"] == "4"


def test_a_command_with_its_own_options(capsys, tmp_path):
    rows = [{"messages": [{"role": "assistant", "content": text}]} for text in ("a", "abc", "ab")]
    write_rows(tmp_path / "samples.jsonl", rows)
    option = ["--plugins", *plugin("command")]
    assert main(["longest", str(tmp_path), *option]) == 0
    assert capsys.readouterr().out == "abc\n"
    assert main(["longest", "--directry", "x", *option]) == 2
    assert "did you mean 'directory'" in capsys.readouterr().err


def test_an_engine_with_options(tmp_path, echo_model):
    engine = {"kind": "uniform", "options": {"length": 3}}
    tree = online_tree(
        tmp_path / "run",
        echo_model,
        plugins=plugin("engine"),
        rollout={"max_new_tokens": 4, "engine": engine},
        num_steps=1,
    )
    run_command("rloo", tree | {"algorithm": {"group_size": 4}})
    assert metrics_of(tmp_path / "run")[0]["rollout/tokens"] == 3


METRICS_OF_PARTS = """
from rlhf.algorithms.metrics import MetricSums
from rlhf.plugins import register_algorithm, register_engine
from rlhf.rollout.sampling.base import Completion, EngineBase, FinishReason

@register_algorithm("own_metrics", title="Own metrics")
def own_metrics(logprobs, batch, settings, *, denominator):
    return 0 * logprobs.sum(), MetricSums(sums={LOSS: logprobs.detach().sum()})

@register_engine("own_metrics")
class Engine(EngineBase):
    def __init__(self, model, config):
        self.requests = []

    def submit(self, requests):
        self.requests += requests

    def poll(self):
        requests, self.requests = self.requests, []
        reason, version = FinishReason.LENGTH, self.policy_version
        return [Completion(r, [5], [-5.0], reason, version) for r in requests]

    def metrics(self):
        return {ENGINE: 5.0}
"""


@pytest.mark.parametrize(
    ("loss", "engine", "refused"),
    [
        ("reward/mean", "engine/x", "metrics of the loss own_metrics: 'reward/mean' is"),
        ("x", "reward/mean", "metrics of rollout.engine.kind own_metrics: 'reward/mean' is"),
        ("x", "step", "metrics of rollout.engine.kind own_metrics: 'step' is"),
        ("time/update", "engine/x", "metrics of the loss own_metrics: 'time/update' is"),
        ("x", "engine/x", None),
    ],
)
def test_metrics_of_a_plugin_replace_none_of_the_run(tmp_path, echo_model, loss, engine, refused):
    path = tmp_path / "own.py"
    path.write_text(METRICS_OF_PARTS.replace("LOSS", repr(loss)).replace("ENGINE", repr(engine)))
    keys = {"plugins": [str(path)], "num_steps": 1}
    tree = online_tree(tmp_path / "run", echo_model, **keys)
    tree["rollout"]["engine"] = {"kind": "own_metrics"}
    if refused:
        with pytest.raises(UserError, match=f"{refused} a metric of the run: choose another name"):
            run_command("own_metrics", tree)
    else:
        run_command("own_metrics", tree)
        row = metrics_of(tmp_path / "run")[0]
        assert row["engine/x"] == 5.0
        assert row["x"] < 0


def test_an_engine_without_a_source_file_is_checked(tmp_path, echo_model):
    code = METRICS_OF_PARTS.replace("LOSS", "'x'").replace("ENGINE", "'x'")
    code = code.replace("self.policy_version", "99").replace('"own_metrics"', '"no_source"')
    exec(code, {"__name__": "interactive_session"})
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1)
    tree["rollout"]["engine"] = {"kind": "no_source"}
    message = "rollout.engine.kind no_source: poll returned a completion with policy_version 99"
    with pytest.raises(UserError, match=message):
        run_command("ppo", tree)


def test_a_kind_of_reward_model(tmp_path, echo_model):
    tree = pairs_tree(tmp_path, echo_model, plugins=plugin("reward_model"), kind="hinge")
    final = run_command("reward", tree)
    assert build({"kind": "trained", "path": str(final)})
    first = next(row["eval/loss"] for row in metrics_of(tmp_path / "run") if "eval/loss" in row)
    assert first == pytest.approx(1, abs=0.1)  # equal scores: max(0, 1 - 0)


def test_an_optimizer_with_the_trainer_of_transformers(tmp_path, echo_model):
    """The only step of signSGD moves every weight with a gradient by the learning rate."""
    tree = pairs_tree(
        tmp_path,
        echo_model,
        plugins=[*plugin("reward_model"), *plugin("optimizer")],
        kind="hinge",
        trainer={"optim": "sign_sgd", "max_steps": 1, "learning_rate": 2.0**-10},
        evaluations=1,
    )
    tree["trainer"]["lr_scheduler_type"] = "constant"
    final = run_command("reward", tree)
    from tests.helpers.training import tensors_of

    before, after = tensors_of(echo_model), tensors_of(final)
    moved = {
        round(float(abs(after[k] - before[k]).max()) * 2**10, 3)
        for k in before
        if k in after and not torch.equal(after[k], before[k])
    }
    assert moved == {1.0}


# Where code is found


def test_code_beside_the_configuration_is_found_from_anywhere(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mine.py").write_text("def score(c):\n    return [1.0] * len(c)\n")
    tree = {
        "rewards": [
            {"kind": "function", "path": "mine.py:score"},
            {"kind": "function", "path": "mine:score", "name": "module"},
            {"kind": "function", "path": "json:dumps"},
            {"kind": "learned", "path": "mine.py"},
        ],
        "env": {"id": "mine.py:Env"},
    }
    config = write_config(folder / "c.yaml", tree)
    monkeypatch.chdir(tmp_path)
    read = assemble_tree_and_load_plugins([config], [])
    code = str(folder / "mine.py")
    assert [spec["path"] for spec in read["rewards"]] == [
        f"{code}:score",
        f"{code}:score",
        "json:dumps",  # an installed module comes first
        "mine.py",  # not code: there is no name
    ]
    assert read["env"]["id"] == f"{code}:Env"
    again = resolve_code_references(read, Path("/elsewhere"))
    assert again == read
    talk = [[{"role": "assistant", "content": "hi"}]]
    assert build(read["rewards"][0])(talk) == [1.0]
    assert build(read["rewards"][0] | {"timeout": 30.0})(talk) == [1.0]  # in another process


def test_a_file_whose_name_is_taken_is_imported_under_another_name(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "json.py").write_text(f"VALUE = {name!r}\n")
    from rlhf.common.imports import import_object

    for name in ("first", "second"):
        assert import_object(f"{tmp_path / name / 'json.py'}:VALUE") == name
    assert json.loads("1") == 1


def test_a_changed_file_is_imported_again(tmp_path):
    path = tmp_path / "mine.py"
    code = "from rlhf.plugins import register_reward\n"
    code += "@register_reward('mine')\ndef mine(c):\n    return [{}] * len(c)\n"
    talk = [[{"role": "assistant", "content": "hi"}]]
    for value in (1.0, 1.0, 2.0):
        path.write_text(code.format(value))
        load_plugins([str(path)])
        assert build({"kind": "mine"})(talk) == [value]


@pytest.mark.slow
def test_an_installed_plugin_is_found_by_its_entry_point(tmp_path, capsys, echo_model):
    site = tmp_path / "site"
    (site / "topr_pack").mkdir(parents=True)
    (site / "topr_pack" / "plugin.py").write_text((PLUGINS / "algorithm.py").read_text())
    (site / "topr_pack" / "__init__.py").touch()
    info = site / "topr_pack-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: topr_pack\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[rlhf.plugins]\ntopr = topr_pack.plugin\nbroken = topr_pack.missing\n"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}
    command = [sys.executable, "-m", "rlhf"]
    done = subprocess.run([*command, "algorithms"], env=env, capture_output=True, text=True)
    assert "topr" in done.stdout
    assert "plug-in broken" in done.stderr
    config = write_config(
        tmp_path / "c.yaml", online_tree(tmp_path / "run", echo_model, num_steps=1)
    )
    words = [*command, "topr", "--config", config]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (site / "topr_pack" / "plugin.py").write_text(
        (PLUGINS / "algorithm.py").read_text() + "CHANGED = True\n"
    )
    done = subprocess.run([*words, "--resume"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "the content of plug-in topr has changed" in done.stderr


# What is refused


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("plugin_api = 2\n", r"mine.py needs version 2 of the plug-in interface, .* version 1"),
        ("plugin_api: int = 2\n", r"mine.py needs version 2 of the plug-in interface"),
        ("\nimport nowhere\n", r"mine.py cannot be imported: ModuleNotFoundError: .*mine.py:2"),
        ("\n\ndef f(:\n", r"mine.py cannot be imported: SyntaxError: .*mine.py:3"),
        ("import sys\nsys.exit(0)\n", r"RuntimeError: called sys.exit\(0\) \(mine.py:2"),
        (
            "from rlhf.plugins import register_reward\n@register_reward('math')\nclass A: ...\n",
            r"kind of reward 'math' exists already in the toolkit: .*\(mine.py:2\)",
        ),
        (
            "from rlhf.plugins import register_environment\n"
            "@register_environment('text/Echo-v0')\nclass A: ...\n",
            r"environment 'text/Echo-v0' exists already \(rlhf.envs.*\): .*\(mine.py:2\)",
        ),
        (
            "from rlhf.plugins import *\nregister_algorithm('a', title='A', loss='clippd')\n",
            r"unknown policy loss 'clippd'; did you mean 'clipped'\? \(mine.py:2\)",
        ),
        (
            "from rlhf.plugins import *\nregister_advantage('a', 'b', reads=('lamda',))(len)\n",
            r"there is no setting 'lamda'; did you mean 'lam'\? \(mine.py:2\)",
        ),
        (
            "from rlhf.plugins import *\n@register_command('c', 'd')\ndef c(x): ...\n",
            r"annotate the configuration of c",
        ),
        (
            "from rlhf.plugins import *\n@register_reward('r')\ndef r(c, limit): ...\n",
            r"the settings follow a \*",
        ),
        (
            "from rlhf.plugins import *\n"
            "register_data_format('f', columns=('a',), kinds=('sfft',))\n",
            r"data format 'f': kinds: there is no kind 'sfft'; did you mean 'sft'\? \(mine.py:2\)",
        ),
    ],
)
def test_a_wrong_plugin_is_refused_in_one_line(capsys, tmp_path, code, message):
    path = tmp_path / "mine.py"
    path.write_text(code)
    assert main(["algorithms", "--plugins", str(path)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    import re

    assert re.search(message, error), error


def test_missing_plugins_are_named(capsys, tmp_path):
    (tmp_path / "mine.py").touch()
    assert main(["algorithms", "--plugins", str(tmp_path / "mime.py")]) == 2
    assert "did you mean 'mine.py'" in capsys.readouterr().err
    assert main(["algorithms", "--plugins", "no_such_module"]) == 2
    assert "cannot import 'no_such_module'" in capsys.readouterr().err
    assert main(["algorithms", "--plugins", str(tmp_path)]) == 2
    assert f"{tmp_path} is not a Python file" in capsys.readouterr().err


def test_an_error_while_a_plugin_runs_names_file_and_line(capsys, tmp_path, echo_model):
    text = (PLUGINS / "algorithm.py").read_text()
    broken = text.replace("weight = torch.where(", "weight = torch.ones(7) + torch.where(")
    path = tmp_path / "mine.py"
    path.write_text(broken)
    line = next(i for i, row in enumerate(broken.splitlines(), 1) if "torch.ones(7)" in row)
    tree = online_tree(tmp_path / "run", echo_model, plugins=[str(path)])
    assert main(["topr", "--config", write_config(tmp_path / "c.yaml", tree)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"(mine.py:{line})" in error
    assert "RuntimeError" in error


def test_a_run_with_a_changed_plugin_or_function_is_not_resumed(capsys, tmp_path, echo_model):
    path = tmp_path / "mine.py"
    text = (PLUGINS / "algorithm.py").read_text()
    path.write_text(text)
    score = tmp_path / "score.py"
    score.write_text("def f(c):\n    return [float(len(x[-1]['content'])) for x in c]\n")
    tree = online_tree(tmp_path / "run", echo_model, plugins=[str(path)], num_steps=1)
    tree["rewards"] = [{"kind": "function", "path": f"{score}:f"}]
    run_command("topr", tree)
    run_command("topr", tree | {"resume": True})
    path.write_text(text + "\nCHANGED = 1\n")
    with pytest.raises(UserError, match=r"the content of plugins.0 .*mine.py.* has changed"):
        run_command("topr", tree | {"resume": True})
    path.write_text(text)
    score.write_text("def f(c):\n    return [0.0 for x in c]\n")
    with pytest.raises(UserError, match=r"the content of rewards.0.path .* has changed"):
        run_command("topr", tree | {"resume": True})


def test_a_run_is_not_resumed_with_another_function_of_the_same_file(tmp_path, echo_model):
    code = "def {}(c):\n    return [float(len(x[-1]['content'])) for x in c]\n"
    (tmp_path / "score.py").write_text(code.format("f") + code.format("g"))
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1)

    def with_reward(path: Path, name: str) -> dict[str, Any]:
        return tree | {"rewards": [{"kind": "function", "path": f"{path}:{name}"}]}

    run_command("rloo", with_reward(tmp_path / "score.py", "f"))
    with pytest.raises(UserError, match=r"rewards\.0\.path was '.*score\.py:f', now '.*:g'"):
        run_command("rloo", with_reward(tmp_path / "score.py", "g") | {"resume": True})
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "score.py").rename(tmp_path / "elsewhere" / "moved.py")
    run_command("rloo", with_reward(moved, "f") | {"resume": True})


def test_a_registry_refuses_names_of_other_sources():
    table: Registry[int] = Registry("thing", {"ours": 1})
    with pytest.raises(UserError, match="thing 'ours' exists already in the toolkit"):
        table.add("ours", 2, test_missing_plugins_are_named)
    table.add("new", 2, test_missing_plugins_are_named)
    table.add("new", 3, test_a_registry_refuses_names_of_other_sources)  # the same file
    assert table["new"] == 3
    with pytest.raises(UserError, match=r"exists already in .*test_plugins\.py"):
        table.add("new", 4, json.dumps)
    with pytest.raises(UserError, match="unknown thing 'nev'; did you mean 'new'"):
        table.require("nev")


# Studies and kills


@pytest.mark.slow
def test_a_benchmark_in_two_processes(capsys, tmp_path):
    """The plug-ins of the manifest define an algorithm, an environment and a reward."""
    names = ("algorithm", "environment", "reward")
    model = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 96}
    tree = {
        "output_dir": str(tmp_path / "out"),
        "plugins": [path for name in names for path in plugin(name)],
        "seeds": [0, 1],
        "episodes": 8,
        "curve_points": 2,
        "model": {"path": str(save_scratch(tmp_path / "model", model))},
        "run": {
            "num_steps": 2,
            "episodes_per_step": 8,
            "rollout": {"max_new_tokens": 1},
            "rewards": [{"kind": "brevity", "weight": 0.1}],
        },
        "references": [],
        "environments": {
            "digit": {"env": {"id": "mine/HotOrCold-v0"}, "random": 0.0, "optimal": 1.0}
        },
        "algorithms": {"topr": {}},
    }
    config = write_config(tmp_path / "manifest.yaml", tree)
    assert main(["bench", config, "--jobs", "2"]) == 0, capsys.readouterr().err
    runs = sorted((tmp_path / "out" / "runs" / "digit").glob("seed*/topr/finished"))
    assert len(runs) == 2


def save_scratch(folder: Path, spec: dict) -> Path:
    from tests.helpers.training import save_model

    return save_model(folder, width=spec["hidden_size"])


def test_a_sweep_of_a_command_that_a_plugin_defines(capsys, tmp_path, echo_model):
    base = write_config(
        tmp_path / "base.yaml",
        {k: v for k, v in online_tree(tmp_path / "x", echo_model).items() if k != "output_dir"}
        | {"plugins": plugin("algorithm"), "num_steps": 1},
    )
    tree = {
        "output_dir": str(tmp_path / "sweep"),
        "run_command": "topr",
        "base": [base],
        "grid": {"algorithm.num_epochs": [1, 2]},
        "metric": "reward/mean",
        "goal": "maximize",
    }
    assert main(["sweep", write_config(tmp_path / "sweep.yaml", tree)]) == 0, capsys.readouterr()
    assert (tmp_path / "sweep" / "report.html").exists()


def test_a_killed_run_of_a_plugin_resumes_bit_for_bit(tmp_path, echo_model):
    configs = {}
    for name in ("whole", "killed"):
        tree = online_tree(
            tmp_path / name / "run",
            echo_model,
            plugins=[*plugin("algorithm"), *plugin("optimizer")],
            optimizer={"name": "sign_sgd", "learning_rate": 1e-4},
            num_steps=6,
        )
        configs[name] = write_config(tmp_path / name / "c.yaml", tree)
    assert main(["topr", "--config", configs["whole"]]) == 0
    code = (
        "import os, signal, sys\n"
        "from rlhf.training import loop\n"
        "save = loop.save_checkpoint\n"
        "def kill(directory, trainer, **keys):\n"
        "    save(directory, trainer, **keys)\n"
        "    if trainer.progress.step == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.save_checkpoint = kill\n"
        "from rlhf.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "topr", "--config", configs["killed"]],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert main(["topr", "--config", configs["killed"], "--resume"]) == 0
    assert_same_run(tmp_path / "whole" / "run", tmp_path / "killed" / "run")


def test_a_pipeline_gives_its_plugins_to_the_stages(tmp_path):
    tree = {
        "output_dir": str(tmp_path / "out"),
        "plugins": plugin("algorithm"),
        "stages": [
            {"name": "first", "command": "topr", "model": {"scratch": {}},
             "env": {"id": "text/Echo-v0"}, "plugins": plugin("reward"),
             "rewards": [{"kind": "brevity"}]},
        ],
    }  # fmt: skip
    pipeline = COMMANDS.read_config("run", [write_config(tmp_path / "p.yaml", tree)], [])
    from rlhf.pipeline import stage_config_tree

    stage = stage_config_tree(pipeline, pipeline.stages[0])
    assert stage["plugins"] == [*plugin("algorithm"), *plugin("reward")]


def test_old_runs_without_plugins_can_be_resumed(tmp_path, echo_model):
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1)
    run_command("ppo", tree)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config.pop("plugins") == []
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    run_command("ppo", tree | {"resume": True})


def test_the_weights_of_plugins_are_used(tmp_path, echo_model):
    """The optimizer of the plug-in gives other weights than SGD."""
    for name, more in (("sgd", {}), ("sign_sgd", {"plugins": plugin("optimizer")})):
        tree = online_tree(tmp_path / name, echo_model, num_steps=1, optimizer={"name": name})
        run_command("ppo", tree | more)
    assert not same(weights_of(tmp_path / "sgd"), weights_of(tmp_path / "sign_sgd"))
