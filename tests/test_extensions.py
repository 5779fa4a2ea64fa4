"""Extensions of the toolkit from outside the package: one function or class and one registration.

An environment, a reward and a policy loss are added by the scripts in `examples/`
(tests/test_examples.py), a kind of reward model in tests/training/test_reward_kinds.py, a rollout
engine in tests/helpers/rollouts.py, a model family in tests/rollout/test_decoder.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rlhf.algorithms import components
from rlhf.algorithms.components import kl_estimator
from rlhf.cli.main import main
from rlhf.cli.table import COMMANDS, run_command
from rlhf.commands.command import Command
from rlhf.common.files import write_jsonl
from rlhf.config.data import DataSpec
from rlhf.data import load, schemas
from rlhf.data.schemas import Schema
from rlhf.models.precision import MasterSGD
from rlhf.runs import trackers
from rlhf.runs.trackers import Tracker
from rlhf.training import optimizers
from tests.helpers.training import (
    metrics_of,
    offline_tree,
    online_tree,
    same,
    sft_rows,
    weights_of,
    write_rows,
)


@dataclass(frozen=True)
class CountConfig:
    text: str


def count(config: CountConfig) -> Iterator[str]:
    yield f"{len(config.text)} characters"
    return 0


def test_a_command(monkeypatch, capsys):
    row = Command("count", "count characters", f"{__name__}:CountConfig", f"{__name__}:count")
    monkeypatch.setitem(COMMANDS, "count", row)
    monkeypatch.setitem(COMMANDS.groups, "Data", [row])
    assert main(["count", "--text", "seven"]) == 0
    assert capsys.readouterr().out.strip() == "5 characters"
    assert main(["--help"]) == 0
    assert "count characters" in capsys.readouterr().out
    assert main(["count", "--txt", "seven"]) == 2
    assert "did you mean 'text'" in capsys.readouterr().err


def test_an_optimizer(monkeypatch, tmp_path, echo_model):
    """The sign of the gradient, which no optimizer of the toolkit uses."""

    class SignSGD(MasterSGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.grad = None if weight.grad is None else weight.grad.sign()
            super().step()

    weights = {}
    for name, row in (("sgd", optimizers.OPTIMIZERS["sgd"]), ("sign", None)):
        factory = row or (lambda weights, settings: SignSGD(weights, lr=settings.learning_rate))
        monkeypatch.setitem(optimizers.OPTIMIZERS, "sgd", factory)
        tree = online_tree(tmp_path / name, echo_model, num_steps=1, optimizer={"name": "sgd"})
        run_command("ppo", tree)
        weights[name] = weights_of(tmp_path / name)
    assert not same(*weights.values())


def test_a_kl_estimator(monkeypatch, tmp_path, echo_model):
    table = dict(components.registered_components("kl"))
    monkeypatch.setitem(components._TABLES, "kl", table)
    kl_estimator("constant", "one for every token")(torch.ones_like)
    algorithm = {"kl_estimator": "constant", "kl_placement": "loss", "kl_coef": 0.125}
    run_command("grpo", online_tree(tmp_path / "run", echo_model, num_steps=1, algorithm=algorithm))
    (row,) = [row for row in metrics_of(tmp_path / "run") if "policy/kl_in_loss" in row]
    assert row["policy/kl_in_loss"] == pytest.approx(1.0)


def test_a_tracker(monkeypatch, tmp_path, echo_model):
    def write_lines(directory, config, step):
        lines = (directory / "lines.jsonl").open("a")
        return Tracker(
            lambda step, metrics: lines.write(json.dumps({"step": step, **metrics}) + "\n"),
            lines.close,
        )

    monkeypatch.setitem(trackers._OPENERS, "tensorboard", write_lines)
    data = write_rows(tmp_path / "rows.jsonl", sft_rows(8))
    run_command("sft", offline_tree(tmp_path / "run", echo_model, data, track=["tensorboard"]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "lines.jsonl").open()]
    assert [line["step"] for line in lines] == [row["step"] for row in metrics_of(tmp_path / "run")]


def test_a_data_format(monkeypatch, tmp_path):
    def read(row, kind):
        yield {"prompt": row["task"], "chosen": row["gold"], "rejected": row["wrong"]}

    schema = Schema("exam", frozenset({"task", "gold", "wrong"}), ("preference",), read)
    monkeypatch.setattr(schemas, "SCHEMAS", (schema, *schemas.SCHEMAS))
    path = tmp_path / "exam.jsonl"
    write_jsonl(path, [{"task": "2 + 2?", "gold": "4", "wrong": "5", "page": 7}])
    loaded = load(DataSpec(str(path)), "preference", seed=0)
    assert loaded.rows[0]["chosen"] == [{"role": "assistant", "content": "4"}]
    assert "columns not used: page" in loaded.summary()
