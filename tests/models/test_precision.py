"""The optimizer against torch's AdamW, and the rules that choose dtype and threads."""

import copy
import gc

import pytest
import torch
from torch import nn

from rlhf.models import precision
from rlhf.models.precision import MasterAdamW, choose_dtype, choose_thread_count, set_thread_count

CPU = torch.device("cpu")


def two_layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def groups(model: nn.Module) -> list[dict]:
    decayed = [p for p in model.parameters() if p.dim() == 2]
    other = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 5, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        schedule.step()


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_are_updated_as_by_adamw_to_the_bit(dtype):
    ours, theirs = two_layers(dtype), two_layers(dtype)
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}
    mine = MasterAdamW(groups(ours), **settings)
    plain = torch.optim.AdamW(groups(theirs), **settings, fused=True)
    train(ours, mine, halving(mine), range(6))
    train(theirs, plain, halving(plain), range(6))
    assert same(ours, theirs)
    assert not same(ours, two_layers(dtype))


def test_bf16_keeps_updates_below_half_a_unit_in_the_last_place():
    # Between 1 and 2 bf16 numbers lie 1/128 apart: steps of 1/1024 up or down are rounded away.
    def after(steps: int, make) -> float:
        weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        optimizer = make([weight])
        for _ in range(steps):
            weight.grad = torch.full_like(weight, -1.0)
            optimizer.step()
        return weight.item()

    plain = after(64, lambda p: torch.optim.AdamW(p, lr=1 / 1024, weight_decay=0.0))
    kept = after(64, lambda p: MasterAdamW(p, lr=1 / 1024))
    assert plain == 1.0
    assert kept == 1.0 + 64 / 1024  # Adam's step is lr for a constant gradient


def test_bf16_weights_are_their_masters_rounded():
    model = two_layers(torch.bfloat16)
    optimizer = MasterAdamW(groups(model), lr=0.01)
    train(model, optimizer, halving(optimizer), range(3))
    for weights, masters in zip(optimizer.param_groups, optimizer.master_weights, strict=True):
        for weight, master in zip(weights["params"], masters, strict=True):
            assert master.dtype == torch.float32
            assert torch.equal(weight, master.bfloat16())
            assert not torch.equal(weight.float(), master)


@pytest.mark.parametrize("at_once", [6, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_continues_to_the_bit(monkeypatch, dtype, at_once):
    monkeypatch.setattr(precision, "OPTIMIZER_CHUNK_ELEMENTS", at_once)
    straight = two_layers(dtype)
    optimizer = MasterAdamW(groups(straight), lr=0.03)
    schedule = halving(optimizer)
    train(straight, optimizer, schedule, range(3))
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    train(straight, optimizer, schedule, range(3, 6))

    resumed = two_layers(dtype)
    again = MasterAdamW(groups(resumed), lr=0.03)
    later = halving(again)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    later.load_state_dict(saved[2])
    train(resumed, again, later, range(3, 6))
    assert same(resumed, straight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [1, 20, 10**6])
def test_clipping_and_chunks_do_not_change_update(monkeypatch, dtype, at_once):
    monkeypatch.setattr(precision, "OPTIMIZER_CHUNK_ELEMENTS", at_once)
    ours, theirs = two_layers(dtype), two_layers(dtype)
    mine = MasterAdamW(groups(ours), lr=0.03)
    plain = torch.optim.AdamW(groups(theirs), lr=0.03)
    norms = []
    for step in range(6):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
        for model, optimizer in ((ours, mine), (theirs, plain)):
            optimizer.zero_grad()
            (4.0**-step * model(inputs)).square().sum().backward()
        norms.append(mine.clip_at_next_step(0.5))
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert norms[-1] == pytest.approx(expected.item(), rel=1e-6)
        mine.step()
        plain.step()
    assert max(norms) > 0.5 > min(norms)
    for mine_, theirs_ in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine_, theirs_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 6, 20])
def test_chunked_update_equals_whole_update(monkeypatch, at_once):
    def trained(pieces: int) -> tuple[nn.Module, MasterAdamW]:
        monkeypatch.setattr(precision, "OPTIMIZER_CHUNK_ELEMENTS", pieces)
        model = two_layers(torch.bfloat16)
        optimizer = MasterAdamW(groups(model), lr=0.03)
        train(model, optimizer, halving(optimizer), range(4))
        return model, optimizer

    (cut, mine), (whole, theirs) = trained(at_once), trained(10**6)
    assert len(mine.state_dict()["inner"]) > len(theirs.state_dict()["inner"])
    for masters, others in zip(mine.master_weights, theirs.master_weights, strict=True):
        for master, other in zip(masters, others, strict=True):
            torch.testing.assert_close(master, other, rtol=1e-6, atol=1e-7)
    for weight, other in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1 / 128, atol=0)


def test_a_clipped_step_does_not_clip_the_next():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=1.0, betas=(0.0, 0.0))
    weight.grad = torch.full_like(weight, 8.0)
    optimizer.clip_at_next_step(1.0)
    optimizer.step()
    (moments,) = (part["state"][0] for part in optimizer.state_dict()["inner"])
    assert moments["exp_avg"].item() == 1.0
    optimizer.step()
    (moments,) = (part["state"][0] for part in optimizer.state_dict()["inner"])
    assert moments["exp_avg"].item() == 8.0


def test_a_weight_without_gradient_stays():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    MasterAdamW([weight], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(2, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("native", "size", "expected"),
    [
        (True, precision.BF16_MIN_PARAMS, torch.bfloat16),
        (True, precision.BF16_MIN_PARAMS - 1, torch.float32),
        (False, precision.BF16_MIN_PARAMS, torch.float32),
    ],
)
def test_auto_is_bf16_for_large_models_on_machines_made_for_it(monkeypatch, native, size, expected):
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: native)
    assert choose_dtype("auto", size, CPU) == expected
    assert choose_dtype("bfloat16", size, CPU) == torch.bfloat16
    assert choose_dtype("float32", size, CPU) == torch.float32


@pytest.fixture
def threads(monkeypatch):
    """Four threads by default, and whatever was set put back."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(precision, "DEFAULT_THREADS", 4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_by_model_size(monkeypatch):
    assert choose_thread_count(precision.MULTITHREAD_MIN_PARAMS - 1, CPU) == 1
    assert choose_thread_count(precision.MULTITHREAD_MIN_PARAMS - 1, torch.device("cuda")) == 4
    torch.set_num_threads(choose_thread_count(10, CPU))
    # A small model before it changes nothing.
    assert choose_thread_count(precision.MULTITHREAD_MIN_PARAMS, CPU) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_thread_count(10, CPU) == 4


@pytest.mark.usefixtures("threads")
def test_small_model_does_not_reduce_threads_of_large_model(monkeypatch):
    monkeypatch.setattr(precision, "MULTITHREAD_MIN_PARAMS", 100)
    large, small = torch.nn.Linear(20, 20), torch.nn.Linear(2, 2)
    set_thread_count(large, CPU)
    set_thread_count(small, CPU)
    assert torch.get_num_threads() == 4
    del large
    gc.collect()
    set_thread_count(small, CPU)  # it is alone now
    assert torch.get_num_threads() == 1
