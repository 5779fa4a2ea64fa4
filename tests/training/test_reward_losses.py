"""Losses in the form that Trainer takes: numbers worked by hand, and batches cut into parts."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf.reward_models import losses
from rlhf.reward_models.losses import IGNORED
from rlhf.training.reward_models import losses as parts

LN2 = math.log(2)


def logits(*rows):
    return {"logits": torch.tensor(rows, dtype=torch.float32, requires_grad=True)}


def plain(chosen, rejected, margin):
    return losses.bradley_terry(chosen, rejected, margin=margin)


def test_pairs_are_neighbouring_rows_and_margins_are_labels():
    loss = parts.on_pairs(plain)
    out = logits([3.0], [1.0], [0.0], [0.0])
    # -log sigmoid(3 - 1 - 2) = ln 2, -log sigmoid(0 - 0 - 0) = ln 2
    assert loss(out, torch.tensor([[2.0], [0.0]])).item() == pytest.approx(LN2)


def test_a_head_learns_nothing_from_a_pair_it_was_not_given():
    loss = parts.on_pairs(plain, centre=0.1)
    out = logits([1.0, 5.0], [1.0, -5.0], [0.5, 1.0], [0.5, 1.0])
    value = loss(out, torch.tensor([[0.0, IGNORED], [IGNORED, 0.0]]))
    # head 0 of pair 0: ln 2 + .1 * (1 + 1)^2; head 1 of pair 1: ln 2 + .1 * (1 + 1)^2
    assert value.item() == pytest.approx(LN2 + 0.4)
    value.backward()
    gradient = out["logits"].grad
    assert gradient[0, 1] == gradient[1, 1] == gradient[2, 0] == gradient[3, 0] == 0
    assert gradient[0, 0] != 0


def test_costs_know_the_worse_reply_and_the_sign():
    out = logits([-1.0], [2.0])  # the safer reply costs -1, the worse one 2
    value = parts.cost(out, torch.tensor([[0.0, 1.0]])).item()
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    assert value == pytest.approx(softplus(-3) + softplus(-2) + softplus(-1))


def test_candidates_are_cut_into_groups():
    out = logits([0.0], [0.0], [1.0], [1.0], [1.0])
    scores = parts.as_candidates(out["logits"], torch.tensor([2, 3]))
    assert scores[0].tolist() == [0.0, 0.0, -math.inf]
    assert scores[1].tolist() == [1.0, 1.0, 1.0]
    value = parts.on_candidates(parts.best_first)(out, torch.tensor([2, 3]))
    assert value.item() == pytest.approx((LN2 + math.log(3)) / 2)
    ranked = parts.on_candidates(losses.ranking)(out, torch.tensor([2, 3]))
    assert ranked.item() == pytest.approx((LN2 + math.log(3) + LN2) / 2)
    ranked.backward()
    assert torch.isfinite(out["logits"].grad).all()


def test_missing_labels_count_neither_in_the_sum_nor_in_the_number():
    out = logits([0.0, 100.0], [0.0, 0.0])
    labels = torch.tensor([[1.0, IGNORED], [0.0, 1.0]])
    assert parts.binary(out, labels).item() == pytest.approx(LN2)
    # errors 1 - 0, (missing), 0 - 0, 1 - 0
    assert parts.ratings(out, labels).item() == pytest.approx(2 / 3)


def test_classes_and_steps():
    assert parts.classes(logits([0.0, 0.0, 0.0]), torch.tensor([2])).item() == pytest.approx(
        math.log(3)
    )
    out = {"logits": torch.tensor([[[0.0, 0.0], [9.0, -9.0], [0.0, 0.0]]])}
    labels = torch.tensor([[1, IGNORED, 0]])
    assert parts.steps(out, labels).item() == pytest.approx(LN2)


GENERATOR = torch.Generator().manual_seed(0)
CASES = {
    "pairs": (
        parts.on_pairs(plain, centre=0.3),
        torch.randn(12, 2, generator=GENERATOR),
        torch.tensor([[0.0, 1.0], [IGNORED, 0.5], [0.0, IGNORED]] * 2),
        2,
    ),
    "cost": (parts.cost, torch.randn(12, 1, generator=GENERATOR), torch.tensor([[0.0, 1]] * 6), 2),
    "binary": (
        parts.binary,
        torch.randn(6, 2, generator=GENERATOR),
        torch.tensor([[1.0, IGNORED], [0, 0], [1, 1]] * 2),
        1,
    ),
    "ratings": (
        parts.ratings,
        torch.randn(6, 2, generator=GENERATOR),
        torch.tensor([[3.0, IGNORED], [0, 0.5], [1, 1]] * 2),
        1,
    ),
    "classes": (
        parts.classes,
        torch.randn(6, 3, generator=GENERATOR),
        torch.tensor([0, 1, 2] * 2),
        1,
    ),
    "candidates": (
        parts.on_candidates(losses.ranking),
        torch.randn(12, 1, generator=GENERATOR),
        torch.tensor([2] * 6),
        2,
    ),
    "steps": (
        parts.steps,
        torch.randn(6, 3, 2, generator=GENERATOR),
        torch.tensor([[0, 1, IGNORED], [IGNORED, IGNORED, 1]] * 3),
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cutting_a_batch_into_parts_changes_no_gradient(name):
    loss, values, labels, per_row = CASES[name]
    whole = values.clone().requires_grad_()
    loss({"logits": whole}, labels).backward()
    count = (labels != IGNORED).sum()  # what Trainer hands over
    cut = values.clone().requires_grad_()
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = cut[rows.start * per_row : rows.stop * per_row]
        loss({"logits": part}, labels[rows], num_items_in_batch=count).backward()
    torch.testing.assert_close(cut.grad, whole.grad)


def test_length_debiasing_reads_quality_from_the_first_head():
    out = logits([1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0])
    labels = torch.tensor([[4.0, 1.0], [4.0, 1.0]])
    # pairs: -log sigmoid(1); quality follows length (|corr| 1), the length head does not (1 - 0)
    expected = math.log1p(math.exp(-1)) + 2.0 * (1 + 1)
    assert parts.length_debiased(2.0)(out, labels).item() == pytest.approx(expected)


def prediction(predictions, labels):
    return SimpleNamespace(predictions=np.array(predictions), label_ids=np.array(labels))


def test_metrics_by_hand():
    found = parts.pair_metrics(prediction([[[1.0], [0.0]], [[2.0], [2.0]]], [[0.0], [0.0]]))
    assert found == {"accuracy": 0.75, "margin": 0.5}
    found = parts.quality_metrics(prediction([[[0.0, 9.0], [1.0, 0.0]]], [[0.0]]))
    assert found == {"accuracy": 0.0, "margin": -1.0}
    scores = [[1.0, 0.0, -100.0], [1.0, 2.0, 0.0]]  # -100 is Trainer's padding, here the highest
    assert parts.candidate_metrics(prediction([[-200.0, -300.0, -100.0], scores[1]], [2, 3])) == {
        "accuracy": 0.5
    }
    assert parts.binary_metrics(prediction([[1.0, -1.0]], [[1.0, IGNORED]])) == {"accuracy": 1.0}
    assert parts.class_metrics(prediction([[0.0, 1.0], [1.0, 0.0]], [1, 1])) == {"accuracy": 0.5}
    steps = prediction([[[0.0, 1.0], [1.0, 0.0]]], [[1, IGNORED]])
    assert parts.step_metrics(steps) == {"accuracy": 1.0}
    assert parts.rating_metrics(prediction([[1.0], [3.0]], [[0.0], [IGNORED]])) == {"rmse": 1.0}
    assert parts.cost_metrics(prediction([[[-1.0], [1.0]]], [[0.0, 0.0]])) == {"accuracy": 0.5}
