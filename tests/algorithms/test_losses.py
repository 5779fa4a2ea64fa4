"""Hand-worked numbers and gradients; nan outside the mask leaks nowhere."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.kl import kl_estimate_per_token, sequence_kl
from rlhf.algorithms.losses import (
    advantage_weighted_likelihood_loss,
    aggregate,
    clipped_loss,
    clipped_sequence_loss,
    clipped_weight_likelihood_loss,
    compute_loss,
    pairwise_dpo_loss,
    value_loss,
)
from rlhf.algorithms.metrics import explained_variance
from rlhf.algorithms.registry import configured_algorithm
from rlhf.algorithms.settings import Settings
from tests.algorithms.batches import batch_of

NAN = math.nan


def logs(*ratios: float) -> Tensor:
    """Log-ratios as one row, float64, that want a gradient."""
    return torch.tensor([ratios]).double().log().requires_grad_()


def test_clipped_surrogate_by_hand():
    """Ratios 1.5 and 0.5, either sign of the advantage: the clip binds only where it would gain."""
    new = logs(1.5, 1.5, 0.5, 0.5)
    old = torch.zeros(1, 4).double()
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0]]).double()
    mask = torch.ones(1, 4, dtype=torch.bool)
    batch = batch_of(mask, old_logprobs=old, advantages=advantages)
    loss, sums = clipped_loss(new, batch, Settings(clip_low=0.2, clip_high=0.3), denominator=4)
    # -(1.3 * 2), 1.5 * 2, -(0.5 * 2), 0.8 * 2
    assert loss.item() == pytest.approx((-2.6 + 3.0 - 1.0 + 1.6) / 4)
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, 3.0, -1.0, 0.0]]).double() / 4)
    metrics = sums.compute()
    assert metrics["policy/clip_fraction_positive"] == 0.5  # 1.5 of 1.5 and 0.5
    assert metrics["policy/clip_fraction_negative"] == 0.5  # 0.5 of 1.5 and 0.5
    assert metrics["policy/clip_fraction"] == 1.0
    assert metrics["policy/ratio_max"] == pytest.approx(1.5)
    assert metrics["policy/loss"] == pytest.approx(loss.item())
    # r - 1 - log r, the divergence from the old policy
    drift = (2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5))) / 4
    assert metrics["policy/approx_kl"] == pytest.approx(drift)


def test_dual_clip_bounds_what_a_bad_token_costs():
    new = logs(10.0, 10.0, 2.0)
    advantages = torch.tensor([[-1.0, 1.0, -1.0]]).double()
    mask = torch.ones(1, 3, dtype=torch.bool)
    batch = batch_of(mask, old_logprobs=torch.zeros(1, 3).double(), advantages=advantages)
    settings = Settings(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    loss, _ = clipped_loss(new, batch, settings, denominator=1)
    assert loss.item() == pytest.approx(3.0 - 1.2 + 2.0)  # 10 without it
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, 0.0, 2.0]]).double())


def test_sequence_ratio_is_the_geometric_mean():
    new = logs(1.2, 1.0, 1.25)
    old = torch.tensor([[0.0, NAN, 0.0]]).double()
    mask = torch.tensor([[True, False, True]])
    advantages = torch.tensor([[1.0, NAN, 1.0]]).double()
    settings = Settings(aggregation="sequence", clip_low=0.5, clip_high=0.5)
    batch = batch_of(mask, old_logprobs=old, advantages=advantages)
    loss, _ = clipped_sequence_loss(new, batch, settings, denominator=1)
    ratio = math.sqrt(1.2 * 1.25)
    assert loss.item() == pytest.approx(-ratio)
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[-ratio / 2, 0.0, -ratio / 2]]).double())


def test_clipped_weight_keeps_the_gradient_of_every_token():
    new = logs(8.0, 0.5)
    advantages = torch.tensor([[1.0, -2.0]]).double()
    mask = torch.ones(1, 2, dtype=torch.bool)
    batch = batch_of(mask, old_logprobs=torch.zeros(1, 2).double(), advantages=advantages)
    loss, sums = clipped_weight_likelihood_loss(
        new, batch, Settings(clip_low=1.0, clip_high=4.0), denominator=2
    )
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[-5.0, 1.0]]).double() / 2)
    assert sums.compute()["policy/clip_fraction"] == 0.5


def test_aggregation():
    per_token = torch.tensor([[1.0, 3.0, NAN], [8.0, NAN, NAN]])
    mask = ~per_token.isnan()
    assert aggregate(per_token, mask, aggregation="token", denominator=3).item() == 4.0
    assert aggregate(per_token, mask, aggregation="sequence", denominator=2).item() == 5.0
    assert aggregate(per_token, mask, aggregation="constant", denominator=2 * 6).item() == 1.0


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 3.0, NAN]]).double().requires_grad_()
    old = torch.tensor([[0.0, 2.9, NAN]]).double()
    returns = torch.tensor([[2.0, 2.0, NAN]]).double()
    mask = torch.tensor([[True, True, False]])
    batch = batch_of(mask, values=old, returns=returns)
    loss, sums = value_loss(values, batch, Settings(value_clip=0.2), denominator=2)
    # clipped to .2: error 3.24 instead of 1 (and no gradient); second 1 either way
    assert loss.item() == pytest.approx(0.5 * (3.24 + 1.0) / 2)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, 0.5, 0.0]]).double())
    assert sums.compute()["value/clip_fraction"] == 0.5
    batch = batch_of(mask, values=old * NAN, returns=returns)
    plain, _ = value_loss(values, batch, Settings(value_clip=0.0), denominator=2)
    assert plain.item() == pytest.approx(0.5)


def test_explained_variance():
    mask = torch.tensor([[True, True, False, True]])
    returns = torch.tensor([[1.0, 2.0, NAN, 3.0]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((1, 4), 5.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(returns, torch.ones(1, 4), mask))


def test_estimators_by_hand():
    new, ref = torch.tensor([[-1.0, NAN]]), torch.tensor([[-3.0, NAN]])
    mask = torch.tensor([[True, False]])
    for name, expected in {"k1": 2.0, "k2": 2.0, "k3": math.exp(-2) + 1.0}.items():
        assert kl_estimate_per_token(new, ref, mask, estimator=name).tolist() == [
            [pytest.approx(expected), 0.0]
        ]
    assert sequence_kl(new, ref, mask).tolist() == [2.0]
    with pytest.raises(ValueError, match="k1, k2 or k3, got 'k4'"):
        kl_estimate_per_token(new, ref, mask, estimator="k4")


def pair_loss(beta: float, labels: str, difference: float = 1.0) -> tuple[float, Tensor]:
    """One pair (log-ratios 0.6 and -0.2 in total) and one row in no pair."""
    new = torch.tensor([[0.1, 0.5], [-0.2, NAN], [NAN, NAN]]).double().requires_grad_()
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    ref = torch.where(mask, 0.0, NAN).double()
    differences = torch.tensor([difference, -difference, 0.0]).double()
    batch = batch_of(
        mask,
        ref_logprobs=ref,
        advantages=differences[:, None].expand(mask.shape),
        pair_ids=torch.tensor([0, 0, 2]),
    )
    loss, _ = pairwise_dpo_loss(
        new, batch, Settings(kl_coef=beta, pair_labels=labels), denominator=1
    )
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_by_hand():
    value, grad = pair_loss(0.5, "hard")
    margin = 0.5 * (0.6 + 0.2)
    assert value == pytest.approx(-math.log(sigma(margin)))
    slope = -0.5 * sigma(-margin)
    expected = [[slope, slope], [-slope, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(grad, torch.tensor(expected).double())


def test_soft_labels_are_the_mean_over_bradley_terry_labels():
    soft, _ = pair_loss(0.5, "soft", 1.0)
    won = sigma(1.0)
    margin = 0.4
    expected = -won * math.log(sigma(margin)) - (1 - won) * math.log(sigma(-margin))
    assert soft == pytest.approx(expected)


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_dpo_starts_at_log_two(labels: str):
    same = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    batch = batch_of(
        torch.ones(4, 3, dtype=torch.bool),
        ref_logprobs=same,
        advantages=torch.tensor([0.3, -0.3, -2.0, 2.0])[:, None].expand(4, 3),
        pair_ids=torch.tensor([0, 0, 2, 2]),
    )
    loss, sums = pairwise_dpo_loss(
        same, batch, Settings(kl_coef=0.1, pair_labels=labels), denominator=2
    )
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert sums.compute()["policy/pair_margin"] == 0.0


def kl_term(new, batch, settings, *, denominator):
    """The loss of GRPO; without advantages only its KL has a gradient."""
    return compute_loss(
        configured_algorithm("grpo"), new, batch, denominator=denominator, kl_coef=1.0
    )


def entropy_term(new, batch, settings, *, denominator):
    """The loss of Dr. GRPO; without advantages only the entropy bonus has a gradient."""
    algorithm = configured_algorithm("dr_grpo", entropy_coef=1.0)
    old = batch.require("old_logprobs")
    return compute_loss(algorithm, old, batch, denominator=denominator, entropy=new)


@pytest.mark.parametrize("seed", range(3))
def test_nan_outside_the_mask_leaks_nowhere(seed: int):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 6, generator=generator) < 0.5
    x = [torch.randn(4, 6, generator=generator).masked_fill(~mask, NAN) for _ in range(4)]
    differences = torch.tensor([1.0, -1.0, 2.0, -2.0])[:, None]
    batch = batch_of(
        mask,
        old_logprobs=x[1],
        ref_logprobs=x[1],
        values=x[1],
        advantages=x[2],
        returns=x[2],
        pair_ids=torch.tensor([0, 0, 2, 2]),
    )
    pairs = replace(batch, advantages=torch.where(mask, differences, NAN))
    settings = Settings(aggregation="sequence", kl_estimator="k3", dual_clip=3.0)
    losses = {
        "policy": (clipped_loss, batch),
        "sequence": (clipped_sequence_loss, batch),
        "weight": (clipped_weight_likelihood_loss, batch),
        "likelihood": (advantage_weighted_likelihood_loss, batch),
        "value": (value_loss, batch),
        "k3": (kl_term, replace(batch, advantages=torch.zeros(4, 6))),
        "entropy": (entropy_term, replace(batch, advantages=torch.zeros(4, 6))),
        "pairs": (pairwise_dpo_loss, pairs),
    }
    for name, (loss, given) in losses.items():
        new = x[0].clone().requires_grad_()
        value, sums = loss(new, given, settings, denominator=3)
        value.backward()
        assert torch.isfinite(value), name
        assert new.grad is not None
        assert (new.grad[~mask] == 0).all(), name
        assert torch.isfinite(new.grad).all(), name
        assert new.grad.abs().sum() > 0, name
        assert all(math.isfinite(number) for number in sums.compute().values()), name
        kept = [*sums.means.values(), *sums.sums.values(), *sums.maxima.values()]
        assert not any(tensor.requires_grad for tensor in kept), name
