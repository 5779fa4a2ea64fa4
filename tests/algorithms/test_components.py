"""A loss and an advantage estimator added from outside: one decorated function each, one row."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rlhf.algorithms.advantages import Advantages, estimate_advantages
from rlhf.algorithms.components import advantage, policy_loss
from rlhf.algorithms.kl import masked_difference
from rlhf.algorithms.losses import aggregate, compute_loss
from rlhf.algorithms.metrics import MetricSums
from rlhf.algorithms.registry import ALGORITHMS, configured_algorithm
from tests.algorithms.batches import batch_of


def unclipped(logprobs, batch, settings, *, denominator):
    mask = batch.require("loss_mask")
    ratio = masked_difference(logprobs, batch.require("old_logprobs"), mask).exp()
    per_token = -ratio * torch.where(mask, batch.require("advantages"), 0.0)
    loss = aggregate(per_token, mask, aggregation=settings.aggregation, denominator=denominator)
    return loss, MetricSums(sums={"policy/loss": loss.detach()})


def sign_of_return(batch, settings):
    return Advantages(settings.gamma * batch.scores().sign())


@pytest.fixture
def mine():
    """The name of an algorithm whose loss and advantage were registered here."""
    policy_loss("unclipped", "no clip", reads=("aggregation",))(unclipped)
    advantage("sign", "sign of the return", reads=("gamma",))(sign_of_return)
    settings = replace(ALGORITHMS["rloo"].settings, advantage="sign", kl_placement="none")
    row = replace(ALGORITHMS["rloo"], name="mine", loss="unclipped", settings=settings)
    ALGORITHMS.add("mine", row, unclipped)
    return "mine"


def test_a_loss_and_an_advantage_from_outside_by_hand(mine):
    """Returns 3 and -2, gamma 0.5, ratios 2 and 4: (-0.5 * 2 + 0.5 * 4) / 2 tokens."""
    algorithm = configured_algorithm(mine, gamma=0.5, aggregation="token")
    batch = batch_of(
        torch.ones(2, 1, dtype=torch.bool),
        rewards=torch.tensor([[3.0], [-2.0]]),
        old_logprobs=torch.zeros(2, 1),
    )
    batch = estimate_advantages(algorithm, batch)
    logprobs = torch.tensor([[2.0], [4.0]]).log()
    loss, _ = compute_loss(algorithm, logprobs, batch, denominator=2)
    assert loss.item() == pytest.approx(0.5)


def test_decorators_read_from_the_source_are_those_that_are_registered():
    """In a fresh interpreter: the same properties before and after the import, and no torch."""
    code = """
import importlib, sys
from dataclasses import replace
from rlhf.algorithms.components import registered_components
tables = {module: dict(registered_components(module)) for module in ("advantages", "losses", "kl")}
assert "torch" not in sys.modules
for module, read in tables.items():
    importlib.import_module(f"rlhf.algorithms.{module}")
    registered = registered_components(module)
    assert read.keys() == registered.keys() and read
    for name, part in registered.items():
        assert part.function is not read[name].function
        assert replace(read[name], function=part.function) == part, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_they_do_not_read_is_refused(mine):
    assert not configured_algorithm(mine).needs_critic
    with pytest.raises(ValueError, match="clip_low has no effect with mine"):
        configured_algorithm(mine, clip_low=0.1, num_epochs=2)
    with pytest.raises(ValueError, match=r"advantage must be one of .*sign, got 'signs'"):
        configured_algorithm(mine, advantage="signs")
