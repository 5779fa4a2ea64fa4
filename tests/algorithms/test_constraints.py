import math

import pytest
import torch

from rlhf.algorithms.controllers import (
    AdaptiveKL,
    FixedKL,
    LagrangeMultiplier,
    RunningRewardMoments,
    StopAtKLBudget,
)


def test_fixed_stays():
    controller = FixedKL(0.05)
    controller.update(100.0, 64)
    assert (controller.coef, controller.stop) == (0.05, False)


def test_adaptive_by_hand():
    """lm-human-preferences: the error is clipped at 20 %, the step is its share of the horizon."""
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    controller.update(60.0, 500)
    assert controller.coef == pytest.approx(0.15 * (1 + 0.2 * 0.05))
    controller.update(5.7, 1000)
    assert controller.coef == pytest.approx(0.15 * 1.01 * (1 - 0.05 * 0.1))
    controller.update(0.0, 10_000)
    assert controller.coef == pytest.approx(0.15 * 1.01 * 0.995 * 0.8)


def test_budget_stops_for_good():
    controller = StopAtKLBudget(0.05, budget=2.0)
    controller.update(2.0, 1)
    assert not controller.stop
    controller.update(2.1, 1)
    controller.update(0.0, 1)
    assert controller.stop
    assert controller.coef == 0.05


@pytest.mark.parametrize("make", [FixedKL, AdaptiveKL, StopAtKLBudget])
def test_controllers_resume(make):
    first, second = make(0.15), make(0.4)
    first.update(30.0, 500)
    second.load_state_dict(first.state_dict())
    assert second == first
    assert first.state_dict().keys() == second.state_dict().keys()


def test_multiplier_by_hand():
    multiplier = LagrangeMultiplier(value=2.0, limit=0.5, lr=0.1, maximum=10.0)
    multiplier.update(1.5)  # log v += .1 * 2 * 1
    assert multiplier.value == pytest.approx(2.0 * math.exp(0.2))
    multiplier.value = 2.0
    multiplier.update(0.0)
    assert multiplier.value == pytest.approx(2.0 * math.exp(-0.1))
    multiplier.update(1000.0)
    assert multiplier.value == pytest.approx(10.0)


def test_multiplier_resumes_and_refuses_zero():
    first, second = (LagrangeMultiplier(v, limit=0.0, lr=0.1, maximum=9.0) for v in (3.0, 1.0))
    second.load_state_dict(first.state_dict())
    assert second == first
    with pytest.raises(ValueError, match="multiplier_init must be in"):
        LagrangeMultiplier(0.0, limit=0.0, lr=0.1, maximum=9.0)


@pytest.mark.parametrize("seed", range(3))
def test_moments_in_parts_equal_the_moments_of_all(seed: int):
    scores = torch.randn(100, generator=torch.Generator().manual_seed(seed)) * 3 + 50
    moments = RunningRewardMoments()
    for part in scores.split([1, 30, 2, 67]):
        moments.update(torch.cat([part, torch.tensor([math.nan])]))
    assert moments.count == 100
    assert moments.mean == pytest.approx(float(scores.double().mean()), rel=1e-12)
    assert moments.std == pytest.approx(float(scores.double().std(correction=0)), rel=1e-9)


def test_scaling_and_resuming_moments():
    moments = RunningRewardMoments()
    assert moments.divide_by_std(torch.tensor([3.0]), clip=5.0).tolist() == [3.0]
    moments.update(torch.tensor([math.nan]))
    moments.update(torch.tensor([1.0, 5.0]))  # mean 3, deviation 2
    assert moments.divide_by_std(torch.tensor([1.0, 30.0, -30.0]), clip=5.0).tolist() == [
        0.5,
        5.0,
        -5.0,
    ]
    assert moments.normalize(torch.tensor([1.0, 30.0]), clip=5.0).tolist() == [-1.0, 5.0]
    other = RunningRewardMoments()
    other.load_state_dict(moments.state_dict())
    assert other == moments
