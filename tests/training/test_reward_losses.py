"""Losses of the kinds of reward models: numbers worked by hand, and micro-batches."""

import math

import numpy as np
import pytest
import torch

from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec
from rlhf.config.reward import RewardConfig
from rlhf.data.conversation import RowDropped
from rlhf.reward_models.losses import IGNORED
from rlhf.training.reward_models.base import reward_kind_of

LN2 = math.log(2)


def kind(name="preference", **settings):
    model, data = ModelSpec(path="model"), [DataSpec("rows.jsonl")]
    return reward_kind_of(
        RewardConfig(output_dir="run", model=model, data=data, kind=name, **settings)
    )


CENTERED = {"trainer": {"center_rewards_coefficient": 0.1}, "num_heads": 2}
WHOLE = {"batch_size": 8, "micro_batch_size": 8, "length_coef": 2.0}


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float32, requires_grad=True)


def loss_of(kind, logits, labels):
    return kind.loss(logits, labels, (labels != IGNORED).sum())


@pytest.mark.parametrize("name", ["preference", "scaled"])
def test_pairs_whose_scores_contradict_the_choice_are_dropped(name):
    settings = {"margins": True} if name == "preference" else {}
    with pytest.raises(RowDropped, match="margin below 0"):
        kind(name, **settings).encode(None, {"margin": -4.0})


def test_pair_loss_with_margins():
    out = logits([3.0], [1.0], [0.0], [0.0])
    # -log sigmoid(3 - 1 - 2) = ln 2, -log sigmoid(0 - 0 - 0) = ln 2
    value = loss_of(kind(margins=True), out, torch.tensor([[2.0], [0.0]]))
    assert value.item() == pytest.approx(LN2)


def test_ignored_labels_of_a_head_have_no_gradient():
    out = logits([1.0, 5.0], [1.0, -5.0], [0.5, 1.0], [0.5, 1.0])
    value = loss_of(kind(**CENTERED), out, torch.tensor([[0.0, IGNORED], [IGNORED, 0.0]]))
    # head 0 of pair 0: ln 2 + .1 * (1 + 1)^2; head 1 of pair 1: ln 2 + .1 * (1 + 1)^2
    assert value.item() == pytest.approx(LN2 + 0.4)
    value.backward()
    gradient = out.grad
    assert gradient[0, 1] == gradient[1, 1] == gradient[2, 0] == gradient[3, 0] == 0
    assert gradient[0, 0] != 0


def test_cost_loss():
    out = logits([-1.0], [2.0])  # the safer reply costs -1, the worse one 2
    value = loss_of(kind("cost"), out, torch.tensor([[0.0, 1.0]])).item()
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    assert value == pytest.approx(softplus(-3) + softplus(-2) + softplus(-1))


def test_ranking_and_best_of_losses():
    out = logits([0.0], [0.0], [1.0], [1.0], [1.0])
    scores = kind("ranking").group_by_example(out, torch.tensor([2, 3]))
    assert scores[0].tolist() == [0.0, 0.0, -math.inf]
    assert scores[1].tolist() == [1.0, 1.0, 1.0]
    value = loss_of(kind("best_of"), out, torch.tensor([2, 3]))
    assert value.item() == pytest.approx((LN2 + math.log(3)) / 2)
    ranked = loss_of(kind("ranking"), out, torch.tensor([2, 3]))
    assert ranked.item() == pytest.approx((LN2 + math.log(3) + LN2) / 2)
    ranked.backward()
    assert torch.isfinite(out.grad).all()


def test_missing_labels_are_ignored():
    out = logits([0.0, 100.0], [0.0, 0.0])
    labels = torch.tensor([[1.0, IGNORED], [0.0, 1.0]])
    assert loss_of(kind("multilabel", labels=["a", "b"]), out, labels).item() == pytest.approx(LN2)
    # errors 1 - 0, (missing), 0 - 0, 1 - 0
    assert loss_of(kind("regression"), out, labels).item() == pytest.approx(2 / 3)


def test_classes_and_steps():
    classes = kind("classification", labels=["a", "b", "c"])
    value = loss_of(classes, logits([0.0, 0.0, 0.0]), torch.tensor([2]))
    assert value.item() == pytest.approx(math.log(3))
    out = torch.tensor([[[0.0, 0.0], [9.0, -9.0], [0.0, 0.0]]])
    labels = torch.tensor([[1, IGNORED, 0]])
    assert loss_of(kind("process"), out, labels).item() == pytest.approx(LN2)


GENERATOR = torch.Generator().manual_seed(0)
CASES = {
    "pairs": (
        kind(trainer={"center_rewards_coefficient": 0.3}, num_heads=2),
        torch.randn(12, 2, generator=GENERATOR),
        torch.tensor([[0.0, 1.0], [IGNORED, 0.5], [0.0, IGNORED]] * 2),
        2,
    ),
    "cost": (
        kind("cost"),
        torch.randn(12, 1, generator=GENERATOR),
        torch.tensor([[0.0, 1]] * 6),
        2,
    ),
    "binary": (
        kind("multilabel", labels=["a", "b"]),
        torch.randn(6, 2, generator=GENERATOR),
        torch.tensor([[1.0, IGNORED], [0, 0], [1, 1]] * 2),
        1,
    ),
    "ratings": (
        kind("regression", labels=["a", "b"]),
        torch.randn(6, 2, generator=GENERATOR),
        torch.tensor([[3.0, IGNORED], [0, 0.5], [1, 1]] * 2),
        1,
    ),
    "classes": (
        kind("classification", labels=["a", "b", "c"]),
        torch.randn(6, 3, generator=GENERATOR),
        torch.tensor([0, 1, 2] * 2),
        1,
    ),
    "candidates": (
        kind("ranking"),
        torch.randn(12, 1, generator=GENERATOR),
        torch.tensor([2] * 6),
        2,
    ),
    "steps": (
        kind("process"),
        torch.randn(6, 3, 2, generator=GENERATOR),
        torch.tensor([[0, 1, IGNORED], [IGNORED, IGNORED, 1]] * 3),
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_do_not_change_the_gradient(name):
    kind, values, labels, per_row = CASES[name]
    whole = values.clone().requires_grad_()
    loss_of(kind, whole, labels).backward()
    count = (labels != IGNORED).sum()  # what Trainer hands over
    cut = values.clone().requires_grad_()
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = cut[rows.start * per_row : rows.stop * per_row]
        kind.loss(part, labels[rows], count).backward()
    torch.testing.assert_close(cut.grad, whole.grad)


def test_length_debiased_loss():
    out = logits([1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0])
    labels = torch.tensor([[4.0, 1.0], [4.0, 1.0]])
    # pairs: -log sigmoid(1); quality follows length (|corr| 1), the length head does not (1 - 0)
    expected = math.log1p(math.exp(-1)) + 2.0 * (1 + 1)
    assert loss_of(kind("length_debiased", **WHOLE), out, labels).item() == pytest.approx(expected)


def metrics_of(kind, predictions, labels):
    return kind.metrics(np.array(predictions), np.array(labels))


def test_metrics_of_kinds():
    pairs = [[[1.0], [0.0]], [[2.0], [2.0]]]
    assert metrics_of(kind(), pairs, [[0.0], [0.0]]) == {"accuracy": 0.75, "margin": 0.5}
    debiased = kind("length_debiased", **WHOLE)
    found = metrics_of(debiased, [[[0.0, 9.0], [1.0, 0.0]]], [[0.0]])
    assert found == {"accuracy": 0.0, "margin": -1.0}
    # -100 is Trainer's padding, here the highest
    scores = [[-200.0, -300.0, -100.0], [1.0, 2.0, 0.0]]
    assert metrics_of(kind("ranking"), scores, [2, 3]) == {"accuracy": 0.5}
    ties = [[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]]  # 1/2 and 1/3
    assert metrics_of(kind("ranking"), ties, [3, 3])["accuracy"] == pytest.approx(5 / 12)
    flags, classes = (
        kind("multilabel", labels=["a"]),
        kind("classification", labels=["a", "b", "c"]),
    )
    assert metrics_of(flags, [[1.0, -1.0]], [[1.0, IGNORED]]) == {"accuracy": 1.0}
    assert metrics_of(classes, [[0.0, 1.0], [1.0, 0.0]], [1, 1]) == {"accuracy": 0.5}
    steps = [[[0.0, 1.0], [1.0, 0.0]]]
    assert metrics_of(kind("process"), steps, [[1, IGNORED]]) == {"accuracy": 1.0}
    assert metrics_of(kind("regression"), [[1.0], [3.0]], [[0.0], [IGNORED]]) == {"rmse": 1.0}
    assert metrics_of(kind("cost"), [[[-1.0], [1.0]]], [[0.0, 0.0]]) == {"accuracy": 0.5}
