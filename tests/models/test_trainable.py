"""Copies of models."""

import torch
from torch import nn

from rlhf.models.trainable import copy_model


class StatefulLayer(nn.Module):
    """A layer that keeps the result of its last forward pass, as the layers of RecurrentGemma."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.last = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.linear(x)
        return self.last


def test_a_model_that_keeps_results_with_gradients_is_copied():
    model = nn.Sequential(StatefulLayer(), nn.Linear(2, 1))
    x = torch.tensor([[1.0, -2.0]])
    expected = model(x)
    copied = copy_model(model)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        copied[0].linear.weight.zero_()
    assert torch.equal(model(x), expected)


def test_shared_parameters_are_not_copied():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    shared = {id(p): p for p in model[0].parameters()}
    copied = copy_model(model, shared)
    assert copied[0].weight is model[0].weight
    assert copied[1].weight is not model[1].weight
