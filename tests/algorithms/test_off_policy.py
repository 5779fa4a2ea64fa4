"""Truncated importance weights and the sequence mask, on hand-worked numbers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.advantages import estimate_advantages
from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.losses import compute_loss, loss_denominator
from rlhf.algorithms.off_policy import (
    off_policy_metrics,
    old_to_sampler_log_ratio,
    truncated_importance_weights,
)
from rlhf.algorithms.registry import configured_algorithm
from rlhf.algorithms.settings import Settings
from rlhf.errors import UserError
from tests.algorithms.batches import batch_of

NAN = math.nan


def close(found: Tensor, expected: list) -> None:
    expected_tensor = torch.tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected_tensor, rtol=1e-6, atol=1e-6)


def estimate_returns_to_go(batch: TrainingBatch, **settings: float) -> TrainingBatch:
    """The batch whose advantages and returns are the sums of the rewards from the token on."""
    algorithm = configured_algorithm(
        "ppo", kl_placement="none", whiten_advantages=False, lam=1.0, **settings
    )
    zeros = torch.zeros_like(batch.require("old_logprobs"))
    return estimate_advantages(algorithm, replace(batch, values=zeros, bootstrap=zeros[:, 0]))


def test_the_sampler_mismatch_is_weighed_and_capped():
    mask = torch.tensor([[True, False, True, True]])
    rewards = torch.tensor([[3.0, NAN, -5.0, 4.0]])  # advantages 2, -, -1, 4
    old = torch.tensor([[0.5, NAN, 0.8, 0.9]]).log()
    sampler = torch.tensor([[0.4, NAN, 0.2, 1.0]]).log()
    # ratios 1.25, 4 (capped at 2), 0.9
    batch = batch_of(mask, rewards=rewards, old_logprobs=old, sampler_logprobs=sampler)
    weights = truncated_importance_weights(old_to_sampler_log_ratio(batch, mask), cap=2.0)
    close(weights, [[1.25, 1.0, 2.0, 0.9]])
    found = estimate_returns_to_go(batch, tis_cap=2.0)
    close(found.require("advantages"), [[2.5, 0.0, -2.0, 3.6]])
    close(found.require("returns"), [[2.0, 0.0, -1.0, 4.0]])  # the critic's targets are as before


@pytest.mark.parametrize(
    ("low", "high", "kept"),
    [
        (0, 0, [0, 1, 2, 3]),
        (0.24, 3, [0, 1, 2, 3]),
        (0.9, 0, [0, 1, 3]),
        (0, 1.11, [0, 2, 3]),
        (0, 1.09, [0, 2]),
        (0.9, 1.05, [0]),
    ],
)
def test_the_sequence_mask_compares_the_geometric_mean_with_the_band(low, high, kept):
    """The ratios (2, 1/2), (4, 1), (1/4) and (1.21, 1) have the means 1, 2, 1/4 and 1.1."""
    mask = torch.tensor([[True, True], [True, True], [False, True], [True, True]])
    ratio = torch.tensor([[2.0, 0.5], [4.0, 1.0], [NAN, 0.25], [1.21, 1.0]], dtype=torch.float64)
    old = torch.full((4, 2), -1.0, dtype=torch.float64)
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0], [NAN, 5.0], [6.0, 7.0]], dtype=torch.float64)
    batch = batch_of(mask, rewards=rewards, old_logprobs=old, sampler_logprobs=old - ratio.log())
    found = estimate_returns_to_go(batch, sequence_mask_low=low, sequence_mask_high=high)
    expected = torch.tensor([row in kept for row in range(4)])[:, None] & mask
    assert torch.equal(found.require("loss_mask"), expected)
    onward = torch.tensor([[3.0, 2.0], [7.0, 4.0], [0.0, 5.0], [13.0, 7.0]])
    for name in ("advantages", "returns"):
        close(found.require(name), torch.where(expected, onward, 0.0).tolist())


def test_masked_episodes_stay_in_the_baseline_and_leave_the_denominator():
    """RLOO of the rewards 1 and 4: advantages -3 and 3; the second episode is masked."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    old = torch.full((2, 3), -1.0)
    sampler = old - torch.tensor([[0.0, 0.3, -0.3], [0.6, 0.0, 0.3]])  # mean log-ratios 0 and 0.3
    batch = batch_of(
        mask,
        rewards=torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 4.0]]),
        groups=torch.tensor([0, 0]),
        old_logprobs=old,
        sampler_logprobs=sampler,
    )
    algorithm = configured_algorithm(
        "rloo", kl_placement="none", group_size=2, aggregation="token", sequence_mask_high=1.2
    )
    batch = estimate_advantages(algorithm, batch)
    close(batch.advantages, [[-3.0] * 3, [0.0] * 3])
    denominator = loss_denominator(algorithm, batch.loss_mask, max_tokens=3)
    assert float(denominator) == 3
    logprobs = old.clone().requires_grad_()
    loss, _ = compute_loss(algorithm, logprobs, batch, denominator=denominator)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(3.0)  # ratio 1, advantage -3
    close(logprobs.grad, [[1.0] * 3, [0.0] * 3])


@pytest.mark.parametrize("value", [0.5, 1.0, -1.0])
def test_the_upper_end_of_the_band_is_above_one(value):
    with pytest.raises(UserError, match="sequence_mask_high must be"):
        configured_algorithm("rloo", sequence_mask_high=value)


def test_the_metrics_are_those_of_the_weights_and_of_the_mask():
    """Weights 1, 1, 1 and 3; the last episode has no score."""
    mask = torch.tensor([[True, True], [True, True], [True, True]])
    old = torch.full((3, 2), -1.0, dtype=torch.float64)
    ratio = torch.tensor([[1.0, 1.0], [1.0, 3.0], [9.0, 9.0]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, NAN]])
    batch = batch_of(mask, rewards=rewards, old_logprobs=old, sampler_logprobs=old - ratio.log())
    assert off_policy_metrics(batch, Settings()) == pytest.approx(
        {"sampler/weight_mean": 6 / 4, "sampler/ess": 36 / (4 * 12)}
    )
    # With the cap, the weights are 1, 1, 1 and 2. The geometric means are 1 and sqrt(3).
    assert off_policy_metrics(batch, Settings(tis_cap=2.0, sequence_mask_high=1.7)) == (
        pytest.approx(
            {"sampler/weight_mean": 5 / 4, "sampler/ess": 25 / (4 * 7), "sampler/masked": 0.5}
        )
    )


def test_no_scored_episode_has_no_metrics():
    mask = torch.ones(1, 2, dtype=torch.bool)
    old = torch.zeros(1, 2)
    rewards = torch.tensor([[0.0, NAN]])
    batch = batch_of(mask, rewards=rewards, old_logprobs=old, sampler_logprobs=old)
    assert off_policy_metrics(batch, Settings()) == {}
