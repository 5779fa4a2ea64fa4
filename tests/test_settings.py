"""`--help`, `--print-config`, `config.yaml` and the run agree on the values in force."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS
from rlhf.common.files import read_jsonl
from rlhf.common.imports import import_object
from rlhf.config.load import parse_option_value
from rlhf.training import offline, online
from tests.helpers.command_line import config_file, help_values
from tests.helpers.training import (
    label_rows,
    metrics_of,
    online_tree,
    pair_rows,
    sft_rows,
    write_rows,
)

Tree = dict[str, Any]
SEED, COUNT = 19, 30
ALWAYS = [("grpo", "algorithm.group_size"), ("sft", "trainer.learning_rate")]


def small_runs(folder: Path, model: Path) -> dict[str, Tree]:
    """Command -> configuration of a run of a second; other keys keep their defaults."""
    rows = {"sft": sft_rows(), "dpo": pair_rows(), "kto": label_rows(), "reward": pair_rows()}
    data = {name: write_rows(folder / f"{name}.jsonl", items) for name, items in rows.items()}
    echo = {"id": "text/Echo-v0"}
    runs: dict[str, Tree] = {
        name: {
            "model": {"path": str(model)},
            "data": [{"path": str(path)}],
            "max_length": 48,
            "trainer": {"max_steps": 1},
        }
        for name, path in data.items()
    }
    runs |= {name: online_tree(folder, model, num_steps=1) for name in ALGORITHMS}
    runs["evaluate"] = {"policies": [{"name": "random"}], "env": echo, "episodes": 4}
    files = [{"path": "demos.jsonl", "kind": "sft", "count": 4}]
    runs["demos"] = {"env": "text/Echo-v0", "files": files}
    runs["split"] = {"data": [{"path": str(data["sft"])}], "kind": "sft"}
    sampled = {"rollout": {"max_new_tokens": 4}, "prompts": 4}
    runs["pairs"] = {"model": {"path": str(model)}, "env": echo, **sampled}
    return {name: {**tree, "output_dir": str(folder / name)} for name, tree in runs.items()}


def value_at(tree: Any, key: str) -> Any:
    """The value at a dotted key as plain data; None if it is absent."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return list(tree) if isinstance(tree, tuple) else tree


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tree]:
    """Command -> settings of the objects that train or evaluate, recorded when these are made."""
    recorded: dict[str, Tree] = {}

    def run_command(name: str, config: Any, run: Any) -> Path:
        recorded[name] = dataclasses.asdict(config)
        return import_object(rows[name].run)(name, config, run)

    def fit(trainer: Any, run: Any) -> Path:
        settings = dataclasses.asdict(trainer.algorithm.settings)
        recorded[trainer.algorithm.name]["algorithm"] = settings
        rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
        recorded[trainer.algorithm.name]["optimizer"]["learning_rate"] = rates[0]
        return original_fit(trainer, run)

    def native_options(command: str, *arguments: Any, **keys: Any) -> Any:
        options = original_options(command, *arguments, **keys)
        recorded.setdefault(command, {})["trainer"] = dataclasses.asdict(options)
        return options

    rows = dict(COMMANDS)
    for name, row in rows.items():
        if row.makes_run and not row.runs_commands:
            monkeypatch.setitem(COMMANDS, name, dataclasses.replace(row, run=run_command))
    original_fit, original_options = online.fit, offline.native_options
    monkeypatch.setattr(online, "fit", fit)
    monkeypatch.setattr(offline, "native_options", native_options)
    return recorded


def drawn_settings(shown: dict[str, dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Thirty pairs of a command and a key: one of each command, the rest of any command."""
    print(f"seed {SEED}")
    generator = random.Random(SEED)
    yield from ALWAYS
    others = [name for name in shown if name not in dict(ALWAYS)]
    every = [(name, key) for name in shown for key in shown[name]]
    yield from ((name, generator.choice(sorted(shown[name]))) for name in others)
    yield from generator.sample(every, COUNT - len(others) - len(ALWAYS))


def defaults_in_force(shown: dict[str, str], given: Tree, printed: Tree) -> dict[str, str]:
    """Key -> text of the help, without keys that are given and keys of sections that are absent.

    The help lists the keys of a section such as `model.lora`, which has an effect only if one of
    them is given.
    """

    def in_force(key: str) -> bool:
        *section, _ = key.split(".")
        parent = value_at(printed, ".".join(section)) if section else printed
        recorded = key not in ("resume", "overwrite", "allow_changes")  # of the directory
        return recorded and isinstance(parent, dict) and value_at(given, key) is None

    return {key: text for key, text in shown.items() if in_force(key)}


def test_thirty_settings_agree(tmp_path, echo_model, capsys, used):
    runs = small_runs(tmp_path, echo_model)
    shown, printed = {}, {}
    for name, tree in runs.items():
        path = config_file(tmp_path / f"{name}.yaml", tree)
        assert main([name, "--config", path, "--print-config"]) == 0
        printed[name] = yaml.safe_load(capsys.readouterr().out)
        shown[name] = defaults_in_force(help_values(capsys, name), tree, printed[name])
    drawn = list(drawn_settings(shown))
    assert len(drawn) == COUNT
    assert {name for name, _ in drawn} == set(runs)
    for name in runs:
        assert main([name, "--config", str(tmp_path / f"{name}.yaml")]) == 0
        recorded = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        for key in [key for drawn_name, key in drawn if drawn_name == name]:
            values = [value_at(tree, key) for tree in (printed[name], recorded)]
            if name != "kto" or not key.startswith("trainer."):  # TRL has its own object for these
                values.append(value_at(used[name], key))
            text = parse_option_value(key, shown[name][key])
            assert values == [text] * len(values), (name, key)


def test_settings_of_an_algorithm_have_the_effect_that_the_help_states(
    tmp_path, echo_model, capsys
):
    """Group size, updates of a batch, KL coefficient and learning rate, seen in the run."""
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1, episodes_per_step=16)
    tree |= {"samples_per_step": 16, "optimizer": {}}
    shown = help_values(capsys, "grpo")
    assert main(["grpo", "--config", config_file(tmp_path / "c.yaml", tree)]) == 0
    texts = [
        row["messages"][-2]["content"]
        for row in read_jsonl(tmp_path / "run" / "samples.jsonl")
        if row["split"] == "train"
    ]
    size = int(shown["algorithm.group_size"])
    assert size == 8
    assert all(len(set(texts[start : start + size])) == 1 for start in (0, size))
    (row,) = [row for row in metrics_of(tmp_path / "run") if "train/updates" in row]
    epochs, parts = shown["algorithm.num_epochs"], shown["algorithm.num_minibatches"]
    assert row["train/updates"] == int(epochs) * int(parts)
    assert row["kl/coef"] == float(shown["algorithm.kl_coef"])
