"""Faults that are planted in runs of every method: halts before the update, and warnings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.main import main
from rlhf.cli.table import run_command
from rlhf.config.load import merge_trees
from rlhf.models.policy import Policy
from rlhf.models.precision import MasterOptimizer
from rlhf.runs.alarms import Halt
from rlhf.training import optimize
from rlhf.training.online import OnlineTrainer
from rlhf.training.supervised import SupervisedTrainer
from rlhf.training.trl import trainer as trl
from rlhf.training.trl.callback import RunCallback
from tests.helpers.trainers import tree_of
from tests.helpers.training import first_alarm_steps, online_tree

NATIVE = ("sft", "reward", "dpo")
TRL = (*NATIVE, "kto")
Patch = pytest.MonkeyPatch


@pytest.fixture
def updates() -> Iterator[list[Any]]:
    """The optimizer of each update that the native engine began."""
    begun: list[Any] = []

    def count(optimizer: Any, *_: Any) -> None:
        if isinstance(optimizer, MasterOptimizer):
            begun.append(optimizer)

    hook = register_optimizer_step_pre_hook(count)
    yield begun
    hook.remove()


def change_scores(patch: Patch, change: Callable[[torch.Tensor], Any]) -> None:
    """Change the log-probabilities of every pass with gradients in place."""
    score = Policy.score

    def changed(self: Policy, *args: Any, **kwargs: Any) -> Any:
        scored = score(self, *args, **kwargs)
        if torch.is_grad_enabled():
            with torch.no_grad():
                change(scored.logprobs)
        return scored

    patch.setattr(Policy, "score", changed)


def nan_scores(patch: Patch) -> None:
    change_scores(patch, lambda logprobs: logprobs.mul_(math.nan))


def infinite_scores(patch: Patch) -> None:
    change_scores(patch, lambda logprobs: logprobs.sub_(math.inf))


def shifted_scores(patch: Patch) -> None:
    change_scores(patch, lambda logprobs: logprobs.add_(0.01))


def frozen_before(patch: Patch) -> None:
    """One weight is frozen before the optimizer is made, which then omits it."""
    make_optimizer = OnlineTrainer._make_optimizer_and_scheduler

    def frozen(self: OnlineTrainer, *args: Any) -> Any:
        freeze_one_weight(self.policy.model)
        return make_optimizer(self, *args)

    patch.setattr(OnlineTrainer, "_make_optimizer_and_scheduler", frozen)


def freeze_one_weight(model: torch.nn.Module) -> None:
    list(model.parameters())[1].requires_grad_(False)


def unscorable(conversations: Any) -> list[float]:
    """A reward that scores nothing."""
    return [math.nan] * len(conversations)


ONLINE_FAULTS: dict[str, tuple[str, Callable[[Patch], None] | None]] = {
    "nan": ("not_finite", nan_scores),
    "infinity": ("not_finite", infinite_scores),
    "ratio": ("first_ratio", shifted_scores),
    "frozen weight": ("frozen", frozen_before),
    "unscored": ("nothing_scored", None),
}


@pytest.mark.parametrize("fault", ONLINE_FAULTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_halts_before_its_first_update(
    algorithm: str,
    fault: str,
    tmp_path: Path,
    echo_model: Path,
    updates: list[Any],
    monkeypatch: Patch,
) -> None:
    name, change = ONLINE_FAULTS[fault]
    tree = online_tree(tmp_path / "run", echo_model)
    if change:
        change(monkeypatch)
    else:
        path = "tests.training.test_alarms_by_method:unscorable"
        keys = {"shaping": {"max_unscored": 1.0}, "rewards": [{"kind": "function", "path": path}]}
        tree = merge_trees(tree, keys)
    with pytest.raises(Halt) as halt:
        run_command(algorithm, tree)
    assert halt.value.name == name
    assert updates == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", NATIVE)
def test_a_weight_that_is_not_finite_halts_the_next_update(
    method: str,
    value: float,
    tmp_path: Path,
    echo_model: Path,
    updates: list[Any],
    monkeypatch: Patch,
) -> None:
    checked = SupervisedTrainer.compute_checked_gradients

    def planted(self: SupervisedTrainer, batch: Any) -> Any:
        if len(updates) == 3:
            with torch.no_grad():
                self.model.parameters()[1].fill_(value)
        return checked(self, batch)

    monkeypatch.setattr(SupervisedTrainer, "compute_checked_gradients", planted)
    with pytest.raises(Halt) as halt:
        run_command(method, tree_of(method, tmp_path, echo_model, engine="native"))
    assert halt.value.name == "not_finite"
    assert len(updates) == 3


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", NATIVE)
def test_one_frozen_weight_halts_the_first_update(
    method: str,
    when: str,
    tmp_path: Path,
    echo_model: Path,
    updates: list[Any],
    monkeypatch: Patch,
) -> None:
    init = SupervisedTrainer.__init__

    def frozen(self: SupervisedTrainer, config: Any, options: Any, setup: Any, *sets: Any) -> None:
        if when == "before":
            freeze_one_weight(setup.model)
        init(self, config, options, setup, *sets)
        freeze_one_weight(setup.model)

    monkeypatch.setattr(SupervisedTrainer, "__init__", frozen)
    with pytest.raises(Halt, match="alarm frozen: 1 of"):
        run_command(method, tree_of(method, tmp_path, echo_model, engine="native"))
    assert updates == []


def test_dpo_halts_if_its_policy_does_not_start_as_the_reference(
    tmp_path: Path, echo_model: Path, updates: list[Any], monkeypatch: Patch, capsys: Any
) -> None:
    shifted_scores(monkeypatch)
    with pytest.raises(Halt, match="alarm first_ratio") as halt:
        run_command("dpo", tree_of("dpo", tmp_path, echo_model, engine="native"))
    assert halt.value.name == "first_ratio"
    assert updates == []
    assert main(["replay", str(tmp_path / "run")]) == 0
    assert "reproduced: first_ratio" in capsys.readouterr().out


@pytest.mark.parametrize("method", TRL)
def test_trl_halts_before_an_update_that_is_not_finite(
    method: str, tmp_path: Path, echo_model: Path, monkeypatch: Patch, capsys: Any
) -> None:
    weights: list[torch.Tensor] = []
    step_end = RunCallback.on_step_end

    def planted(self: RunCallback, *args: Any, model: Any = None, **kwargs: Any) -> Any:
        if args[1].global_step == 2:
            weights.extend(model.parameters())
            weights[1].register_hook(lambda gradient: gradient * math.nan)
            weights.extend(weight.detach().clone() for weight in weights[:])
        return step_end(self, *args, model=model, **kwargs)

    monkeypatch.setattr(RunCallback, "on_step_end", planted)
    with pytest.raises(Halt, match="in step 3: the gradient") as halt:
        run_command(method, tree_of(method, tmp_path, echo_model))
    assert halt.value.name == "not_finite"
    half = len(weights) // 2
    torch.testing.assert_close(weights[:half], weights[half:], rtol=0, atol=0, equal_nan=True)
    assert main(["replay", str(tmp_path / "run")]) == 2
    assert "engine trl, which does not save batches" in capsys.readouterr().err


@pytest.mark.parametrize("method", TRL)
def test_trl_halts_before_an_update_without_a_weight_that_should_train(
    method: str, tmp_path: Path, echo_model: Path, monkeypatch: Patch
) -> None:
    make_trainer = trl.make_trainer

    def frozen(setup: Any, *args: Any) -> Any:
        freeze_one_weight(setup.model)
        return make_trainer(setup, *args)

    monkeypatch.setattr(trl, "make_trainer", frozen)
    with pytest.raises(Halt, match="alarm frozen: 1 of"):
        run_command(method, tree_of(method, tmp_path, echo_model))


def explode(trainer: OnlineTrainer) -> None:
    for weight in trainer.policy.parameters():
        if weight.grad is not None:
            weight.grad.mul_(1e6)


def sharpen(trainer: OnlineTrainer) -> None:
    """Make the policy deterministic; an untrained one then repeats a token."""
    with torch.no_grad():
        trainer.policy.model.model.norm.weight.mul_(1e3)


def test_a_gradient_that_explodes_is_a_warning_of_its_step(
    tmp_path: Path, echo_model: Path, monkeypatch: Patch
) -> None:
    checked = optimize.compute_checked_gradients

    def planted(trainer: OnlineTrainer, *args: Any, **kwargs: Any) -> Any:
        sums = checked(trainer, *args, **kwargs)
        if trainer.progress.step == 22:
            explode(trainer)
        return sums

    monkeypatch.setattr(optimize, "compute_checked_gradients", planted)
    run_command("grpo", online_tree(tmp_path / "run", echo_model, num_steps=25))
    assert first_alarm_steps(tmp_path / "run")["exploding_gradient"] == 23


def test_collapse_of_entropy_and_repetition_are_warnings_within_5_steps(
    tmp_path: Path, echo_model: Path, monkeypatch: Patch
) -> None:
    step = OnlineTrainer.step

    def planted(self: OnlineTrainer, number: int, run: Any) -> Any:
        if number == 8:
            sharpen(self)
        return step(self, number, run)

    monkeypatch.setattr(OnlineTrainer, "step", planted)
    keys = {"rollout": {"max_new_tokens": 12}, "optimizer": {"learning_rate": 1e-9}}
    run_command("grpo", online_tree(tmp_path / "run", echo_model, num_steps=15, **keys))
    steps = first_alarm_steps(tmp_path / "run")
    assert 9 <= steps["entropy_collapse"] <= 13
    assert 9 <= steps["repetition_collapse"] <= 13
