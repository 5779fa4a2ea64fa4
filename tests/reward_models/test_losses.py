import itertools
import math

import pytest
import torch

from rlhf.reward_models import losses


def t(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_bradley_terry_by_hand():
    loss = losses.bradley_terry_loss(t(2.0, 0.0), t(1.0, 0.0))
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-1)), math.log(2)])
    with_margin = losses.bradley_terry_loss(t(2.0), t(1.0), margin=torch.tensor([1.0]))
    assert with_margin.item() == pytest.approx(math.log(2))
    smooth = losses.bradley_terry_loss(t(2.0), t(1.0), label_smoothing=0.1)
    assert smooth.item() == pytest.approx(-0.9 * log_sigmoid(1) - 0.1 * log_sigmoid(-1))


def test_smoothing_has_its_minimum_where_the_probability_is_the_label_quality():
    d = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    loss = losses.bradley_terry_loss(d, torch.zeros(1), label_smoothing=0.2)
    assert d[loss.argmin()].item() == pytest.approx(math.log(0.8 / 0.2), abs=1e-3)


def test_scaled_weighs_by_strength():
    loss = losses.scaled_bradley_terry_loss(
        t(1.0, 1.0), t(0.0, 0.0), strength=torch.tensor([1.0, 3.0])
    )
    assert loss[1].item() == pytest.approx(3 * loss[0].item())


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.35])
@pytest.mark.parametrize("d", [-2.0, 0.3, 4.0])
def test_unbiased_loss_on_flipped_labels_averages_to_the_clean_loss(flip_rate, d):
    a, b = t(d), t(0.0)
    kept = losses.unbiased_bradley_terry_loss(a, b, flip_rate=flip_rate)
    flipped = losses.unbiased_bradley_terry_loss(b, a, flip_rate=flip_rate)
    mean = (1 - flip_rate) * kept + flip_rate * flipped
    assert mean.item() == pytest.approx(-log_sigmoid(d))


@pytest.mark.parametrize("rate", [-0.1, 0.5])
def test_impossible_noise_is_refused(rate):
    with pytest.raises(ValueError, match="flip_rate must be in"):
        losses.unbiased_bradley_terry_loss(t(1.0), t(0.0), flip_rate=rate)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        losses.bradley_terry_loss(t(1.0), t(0.0), label_smoothing=rate)


def test_centering():
    assert losses.add_centering_penalty(
        t(0.0, 0.0), t(2.0, 1.0), t(-2.0, 2.0), coef=1.0
    ).tolist() == [0.0, 9.0]


def test_best_of_two_is_bradley_terry_and_masked_candidates_do_not_exist():
    scores = torch.tensor([[1.0, 3.0, math.nan], [2.0, 0.0, 1.0]], dtype=torch.float64)
    scores.requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    loss = losses.best_of_loss(scores, torch.tensor([1, 0]), mask=mask)
    third = -math.log(math.exp(2) / (math.exp(2) + 1 + math.e))
    assert loss.tolist() == pytest.approx([-log_sigmoid(2.0), third])
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, 2] == 0
    assert torch.isfinite(scores.grad).all()


def test_ranking_probabilities_of_all_orders_sum_to_one():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    orders = torch.stack([scores[list(p)] for p in itertools.permutations(range(4))])
    loss = losses.ranking_loss(orders, mask=torch.ones_like(orders, dtype=torch.bool))
    assert torch.exp(-loss).sum().item() == pytest.approx(1.0)


def test_ranking_ignores_padding():
    scores = torch.tensor([[1.0, 0.0, math.nan]], dtype=torch.float64, requires_grad=True)
    loss = losses.ranking_loss(scores, mask=torch.tensor([[True, True, False]]))
    assert loss.item() == pytest.approx(-log_sigmoid(1.0))
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, :2].tolist() == pytest.approx([-0.2689, 0.2689], abs=1e-4)
    assert scores.grad[0, 2] == 0


def test_cost_model_pulls_signs_apart():
    worse, better = t(0.5), t(-0.5)
    yes, no = torch.tensor([True]), torch.tensor([False])
    right = losses.cost_model_loss(worse, better, worse_unsafe=yes, better_unsafe=no)
    assert right.item() == pytest.approx(-log_sigmoid(1.0) - 2 * log_sigmoid(0.5))
    wrong = losses.cost_model_loss(worse, better, worse_unsafe=no, better_unsafe=yes)
    assert wrong.item() == pytest.approx(-log_sigmoid(1.0) - 2 * log_sigmoid(-0.5))


def test_regression_skips_missing_ratings_and_splits_without_a_trace():
    predictions = torch.tensor([[1.0, 2.0], [0.0, 5.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0.0, math.nan], [2.0, 5.0]], dtype=torch.float64)
    whole = losses.regression_loss(predictions, targets, num_targets=3)
    assert whole.item() == pytest.approx((1 + 4 + 0) / 3)
    parts = sum(
        losses.regression_loss(predictions[i : i + 1], targets[i : i + 1], num_targets=3)
        for i in range(2)
    )
    assert torch.as_tensor(parts).item() == pytest.approx(whole.item())
    whole.backward()
    assert predictions.grad is not None
    assert predictions.grad[0, 1] == 0


def test_step_ends_reads_only_labeled_tokens():
    logits = torch.full((1, 4, 2), math.nan, dtype=torch.float64)
    logits[0, 1] = torch.tensor([0.0, 1.0])
    logits[0, 3] = torch.tensor([2.0, 0.0])
    labels = torch.tensor([[-100, 1, -100, 1]])
    loss = losses.step_end_loss(logits, labels, num_steps=2)
    assert loss.item() == pytest.approx((-log_sigmoid(1.0) - log_sigmoid(-2.0)) / 2)


def test_length_debiased_by_hand_and_gradient_removes_the_correlation():
    generator = torch.Generator().manual_seed(0)
    sizes = (torch.rand(64, generator=generator) * 100, torch.rand(64, generator=generator) * 100)
    quality = tuple((s / 50 - 1).double().requires_grad_() for s in sizes)
    length = tuple(torch.zeros(64, dtype=torch.float64) for _ in range(2))
    loss = losses.length_debiased_loss(quality, length, sizes, coef=10.0)
    plain = losses.bradley_terry_loss(*quality).mean()
    assert loss.item() == pytest.approx(plain.item() + 10 * (1.0 + 1.0 - 0.0), rel=1e-6)
    optimizer = torch.optim.Adam(quality, lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        losses.length_debiased_loss(quality, length, sizes, coef=10.0).backward()
        optimizer.step()
    rho = torch.corrcoef(torch.stack([torch.cat(quality), torch.cat(sizes).double()]))[0, 1]
    assert abs(rho.item()) < 0.05
    assert (quality[0] > quality[1]).float().mean() > 0.9
