"""The table of optimizers: both engines and the online loop construct theirs from it."""

import copy

import pytest
import torch
from torch import nn

from rlhf.cli.table import run_command
from rlhf.common.ranges import convert_to_type
from rlhf.config.online import OptimizerSpec
from rlhf.errors import UserError
from rlhf.training.optimizers import (
    OPTIMIZERS,
    OptimizerSettings,
    TorchOptimizerAdapter,
    make_optimizer,
)
from tests.helpers.training import metrics_of, offline_tree, same, sft_rows, weights_of, write_rows


def test_the_configuration_accepts_exactly_the_registered_optimizers():
    for name in OPTIMIZERS:
        assert convert_to_type(OptimizerSpec, {"name": name}).name == name
    with pytest.raises(UserError, match="name must be 'adamw' or 'sgd', got 'adam'"):
        convert_to_type(OptimizerSpec, {"name": "adam"})


@pytest.mark.parametrize("clipped", [False, True])
def test_an_optimizer_of_torch_is_clipped_and_restored(clipped):
    """Weight 1, gradient 3 (clipped to 1.5), learning rate 0.1, no momentum before step 2."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = TorchOptimizerAdapter(torch.optim.SGD([weight], lr=0.1, momentum=0.5))
    weight.grad = torch.full_like(weight, 3.0)
    assert optimizer.clip_at_next_step(1.5 if clipped else 5.0) == 3.0
    optimizer.step()
    assert weight.item() == pytest.approx(0.85 if clipped else 0.7)
    other = nn.Parameter(weight.detach().clone())
    restored = TorchOptimizerAdapter(torch.optim.SGD([other], lr=0.1, momentum=0.5))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, steps in ((weight, optimizer), (other, restored)):
        steps.param_groups[0]["lr"] = 0.2  # as a scheduler sets it
        parameter.grad = torch.ones(1)
        steps.clip_at_next_step(10.0)
        steps.step()
    assert torch.equal(weight, other)
    momentum = 0.5 * (1.5 if clipped else 3.0) + 1
    assert weight.item() == pytest.approx((0.85 if clipped else 0.7) - 0.2 * momentum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sgd_by_hand(dtype):
    """Weight 1, gradient 3 clipped to 1.5, learning rate 0.1, decay 0.2: 1 - 0.1 (1.5 + 0.2)."""
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    settings = OptimizerSettings(learning_rate=0.1, weight_decay=0.2)
    optimizer = make_optimizer("sgd", [weight], settings)
    weight.grad = torch.full_like(weight, 3.0)
    assert optimizer.clip_at_next_step(1.5) == 3.0
    optimizer.step()
    ((master,),) = optimizer.master_weights
    assert master.item() == pytest.approx(0.83, abs=1e-6)
    assert weight.item() == pytest.approx(0.83, abs=1e-6 if dtype == torch.float32 else 4e-3)


def test_sgd_accumulates_updates_that_bf16_cannot_hold():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = make_optimizer("sgd", [weight], OptimizerSettings(learning_rate=1e-3))
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.master_weights[0][0].item() == pytest.approx(0.99, abs=1e-6)


@pytest.mark.parametrize(
    ("engine", "dtype"), [("native", "float32"), ("native", "bfloat16"), ("trl", "bfloat16")]
)
def test_both_engines_train_with_sgd(tmp_path, echo_model, engine, dtype):
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    weights = {}
    for optim in ("adamw_torch", "sgd"):
        tree = offline_tree(
            tmp_path / optim, echo_model, data, engine=engine, trainer={"optim": optim}
        )
        run_command("sft", tree | {"model": {"path": str(echo_model), "dtype": dtype}})
        weights[optim] = weights_of(tmp_path / optim)
        losses = [row["train/loss"] for row in metrics_of(tmp_path / optim) if "train/loss" in row]
        assert min(losses[1:]) < losses[0]
    assert not same(*weights.values())


def test_optimizers_without_float32_state_are_refused_for_bf16_weights(tmp_path, echo_model):
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    trainer = {"optim": "adafactor"}
    tree = offline_tree(tmp_path / "run", echo_model, data, engine="trl", trainer=trainer)
    model = {"path": str(echo_model), "dtype": "bfloat16"}
    with pytest.raises(UserError, match=r"trainer.optim: adafactor has no float32 master"):
        run_command("sft", tree | {"model": model})
    run_command("sft", tree | {"overwrite": True, "model": {**model, "dtype": "float32"}})
