"""Dropout, a model's own and that of adapters: on in the updates of SFT and reward models alone."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from rlhf.cli.table import run_command
from rlhf.config.model import LoraSpec, ModelSpec
from rlhf.models.architecture import unwrap_peft
from rlhf.models.loading import load_model
from rlhf.models.trainable import remove_model_dropout
from rlhf.training import offline
from rlhf.training.online import OnlineTrainer
from tests.helpers.models import gpt2_config
from tests.helpers.training import (
    evaluations,
    label_rows,
    metrics_of,
    offline_tree,
    online_tree,
    pair_rows,
    same,
    save_model,
    sft_rows,
    weights_of,
    write_rows,
)

RATE = 0.3
LORA = {"rank": 4, "dropout": RATE}
ROWS = {"sft": sft_rows, "reward": pair_rows, "dpo": pair_rows, "kto": label_rows}
STARTS = ("adapters", "own", "both")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The key `model` of a model with adapters' dropout, with its own, and with both."""
    folder = tmp_path_factory.mktemp("dropout")
    llama = save_model(folder / "llama", sharp=6.0)
    _, tokenizer = load_model(ModelSpec(path=str(llama)), seed=0)
    rates = {"resid_pdrop": RATE, "embd_pdrop": RATE, "attn_pdrop": RATE}
    config = gpt2_config(tokenizer, positions=64, initializer_range=0.2, **rates)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return {
        "adapters": {"path": str(llama), "lora": LORA},
        "own": {"path": str(folder / "gpt2")},
        "both": {"path": str(folder / "gpt2"), "lora": LORA},
    }


def tree_of(folder: Path, command: str, model: Any, **keys: Any) -> dict[str, Any]:
    """A run of a few steps on that model."""
    if command in ROWS:
        data = write_rows(folder.with_suffix(".jsonl"), ROWS[command](16))
        tree = offline_tree(folder, Path("unused"), data, **{"trainer": {"max_steps": 4}, **keys})
    else:
        tree = online_tree(folder, Path("unused"), **keys)
    return tree | {"model": model}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_the_first_importance_ratio_of_an_online_batch_is_1(
    tmp_path: Path, places: dict[str, Any], command: str, start: str
) -> None:
    algorithm = {"num_epochs": 1, "num_minibatches": 1}
    algorithm |= {"group_size": 4} if command == "grpo" else {}
    tree = tree_of(tmp_path / "run", command, places[start], algorithm=algorithm, num_steps=3)
    run_command(command, tree)
    rows = metrics_of(tmp_path / "run")
    assert len(rows) == 3
    for row in rows:
        assert row["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
        assert row["sampler/logprob_diff_abs"] < 1e-5
    assert rows[-1]["train/moved"] > 0


def test_evaluating_online_changes_nothing_that_is_learned(
    tmp_path: Path, places: dict[str, Any]
) -> None:
    for name, every in (("never", 0), ("often", 1)):
        evaluation = {"episodes": 4, "every": every}
        run_command("ppo", tree_of(tmp_path / name, "ppo", places["both"], evaluation=evaluation))
    assert same(weights_of(tmp_path / "never"), weights_of(tmp_path / "often"))


def test_a_resumed_online_run_ends_like_the_whole_one(
    tmp_path: Path, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_command("ppo", tree_of(tmp_path / "whole", "ppo", places["both"]))
    step = OnlineTrainer.step

    def failing(trainer: Any, number: int, run: Any) -> Any:
        if number == 2:
            raise ValueError("cut")
        return step(trainer, number, run)

    cut = tree_of(tmp_path / "cut", "ppo", places["both"])
    monkeypatch.setattr(OnlineTrainer, "step", failing)
    with pytest.raises(ValueError, match="cut"):
        run_command("ppo", cut)
    monkeypatch.setattr(OnlineTrainer, "step", step)
    run_command("ppo", cut | {"resume": True})
    assert same(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("command", "engine"), [("dpo", "native"), ("dpo", "trl"), ("kto", "trl")])
def test_preference_losses_start_at_their_exact_value(
    tmp_path: Path, places: dict[str, Any], command: str, engine: str, start: str
) -> None:
    trainer = {"max_steps": 2, "learning_rate": 1e-12, "logging_steps": 1}
    tree = tree_of(tmp_path / "run", command, places[start], engine=engine, trainer=trainer)
    run_command(command, tree)
    told = [row["train/loss"] for row in metrics_of(tmp_path / "run") if "train/loss" in row]
    expected = math.log(2) if command == "dpo" else 0.5
    assert told == pytest.approx([expected] * 2, abs=1e-6)
    assert evaluations(tmp_path / "run")[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("command", ["sft", "reward", "dpo"])
def test_dropout_acts_in_updates_of_sft_and_reward_models_alone(
    tmp_path: Path,
    places: dict[str, Any],
    command: str,
    start: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which dropout layers are active while a gradient is computed, and while none is."""
    active: dict[bool, set[str]] = {True: set(), False: set()}
    forward = nn.Dropout.forward

    def counting(self: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.p > 0:
            active[torch.is_grad_enabled()].add(self.kind)  # type: ignore[arg-type]
        return forward(self, x)

    fit = offline.fit

    def marking(trainer: Any, run: Any) -> Any:
        for name, module in trainer.model.model.named_modules():
            if isinstance(module, nn.Dropout):
                module.kind = "adapters" if "lora_dropout" in name else "own"  # type: ignore[assignment]
        return fit(trainer, run)

    monkeypatch.setattr(nn.Dropout, "forward", counting)
    monkeypatch.setattr(offline, "fit", marking)
    run_command(command, tree_of(tmp_path / "run", command, places[start], engine="native"))
    kinds = {"adapters": {"adapters"}, "own": {"own"}, "both": {"adapters", "own"}}[start]
    expected = {"sft": kinds, "reward": kinds - {"own"}, "dpo": set()}[command]
    assert active == {True: expected, False: set()}


def test_a_reward_model_keeps_its_own_dropout_where_asked(
    tmp_path: Path, places: dict[str, Any]
) -> None:
    for name, off in (("off", True), ("on", False)):
        trainer = {"max_steps": 2, "disable_dropout": off}
        run_command("reward", tree_of(tmp_path / name, "reward", places["own"], trainer=trainer))
    assert not same(weights_of(tmp_path / "off"), weights_of(tmp_path / "on"))


def test_the_rate_of_adapters_decides_in_sft(tmp_path: Path, places: dict[str, Any]) -> None:
    for name, rate in (("none", 0.0), ("some", RATE)):
        model = places["adapters"] | {"lora": LORA | {"dropout": rate}}
        run_command("sft", tree_of(tmp_path / name, "sft", model))
    assert not same(weights_of(tmp_path / "none"), weights_of(tmp_path / "some"))


def test_a_rate_that_is_left_off_is_told(
    tmp_path: Path, places: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run_command("ppo", tree_of(tmp_path / "run", "ppo", places["adapters"], num_steps=1))
    (line,) = [m for m in caplog.messages if "model.lora.dropout" in m]
    assert "0.3 is ignored in ppo" in line


def test_removing_the_own_dropout_leaves_that_of_adapters(places: dict[str, Any]) -> None:
    spec = ModelSpec(path=places["own"]["path"], lora=LoraSpec(dropout=RATE))
    model, _ = load_model(spec, seed=0)
    remove_model_dropout(model)
    rates = {
        "lora_dropout" in name: module.p
        for name, module in unwrap_peft(model).named_modules()
        if isinstance(module, nn.Dropout)
    }
    assert rates == {True: RATE, False: 0.0}
