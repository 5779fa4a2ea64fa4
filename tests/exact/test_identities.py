"""Algorithms that must coincide, and estimators against the enumerated divergence."""

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.advantages import group_relative, leave_one_out
from rlhf.algorithms.kl import kl_estimate_per_token, sequence_kl
from rlhf.algorithms.losses import (
    advantage_weighted_likelihood_loss,
    clipped_loss,
    clipped_sequence_loss,
    clipped_weight_likelihood_loss,
)
from rlhf.algorithms.settings import Settings
from tests.algorithms.batches import batch_of
from tests.exact.enumeration import Policy, Task, gradient, make_bandit, poisoned, probabilities


@pytest.mark.parametrize("size", [2, 3, 8])
def test_rloo_is_dr_grpo_times_g_over_g_minus_one(size: int):
    scores = torch.randn(5 * size, generator=torch.Generator().manual_seed(size)).double()
    groups = torch.arange(5 * size) % 5
    batch = batch_of(
        torch.ones(5 * size, 1, dtype=torch.bool), rewards=scores[:, None], groups=groups
    )
    centered = group_relative(batch, Settings(scale_by_std=False)).advantages
    torch.testing.assert_close(
        leave_one_out(batch, Settings()).advantages,
        size / (size - 1) * centered,
        rtol=1e-12,
        atol=1e-14,
    )


def one_token_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old, shift, advantages = torch.randn(3, 20, 1, generator=generator, dtype=torch.float64)
    return old + 0.5 * shift, old, advantages


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gspo_is_grpo_at_length_one(seed: int):
    """Off policy, where the clip bites: same loss, same gradient."""
    logprobs, old, advantages = one_token_batch(seed)
    mask = torch.ones_like(old, dtype=torch.bool)
    results = []
    for loss in (clipped_loss, clipped_sequence_loss):
        leaf = logprobs.clone().requires_grad_()
        settings = Settings(aggregation="sequence", clip_low=0.2, clip_high=0.3)
        batch = batch_of(mask, old_logprobs=old, advantages=advantages)
        value, tally = loss(leaf, batch, settings, denominator=20)
        value.backward()
        assert 0 < tally.compute()["policy/clip_fraction"] < 1
        results.append((value.detach(), leaf.grad))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-15)


def test_cispo_without_a_bound_is_the_unclipped_surrogate():
    """The gradient of r A equals r A times that of log pi."""
    logprobs, old, advantages = one_token_batch(3)
    mask = torch.ones_like(old, dtype=torch.bool)
    gradients = []
    for loss in (clipped_loss, clipped_weight_likelihood_loss):
        leaf = logprobs.clone().requires_grad_()
        settings = Settings(aggregation="token", clip_low=1.0, clip_high=1e9)
        batch = batch_of(mask, old_logprobs=old, advantages=advantages)
        value, _ = loss(leaf, batch, settings, denominator=20)
        value.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-15)


def test_ppo_at_ratio_one_is_reinforce():
    logprobs, _, advantages = one_token_batch(4)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    first, second = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    batch = batch_of(mask, old_logprobs=logprobs, advantages=advantages)
    settings = Settings(aggregation="token", clip_low=0.2, clip_high=0.2)
    clipped_loss(first, batch, settings, denominator=20)[0].backward()
    advantage_weighted_likelihood_loss(second, batch, settings, denominator=20)[0].backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-13, atol=1e-15)


def divergence(task: Task, policy: Policy, reference: Policy) -> Tensor:
    """KL(policy || reference) of whole episodes, by enumeration; differentiable."""
    ratio = torch.where(task.mask, policy.logprobs(task) - reference.logprobs(task), 0.0).sum(1)
    return (probabilities(task, policy.logprobs(task)) * ratio).sum()


@pytest.mark.parametrize("turns", [1, 2])
def test_k1_and_k3_have_the_divergence_as_mean(turns: int, one_turn: Task, two_turns: Task):
    task = one_turn if turns == 1 else two_turns
    policy, reference = Policy(1), Policy(2)
    exact = divergence(task, policy, reference).detach()
    chance = probabilities(task, policy.logprobs(task)).detach()
    new, ref = (poisoned(p.logprobs(task).detach(), task.mask) for p in (policy, reference))
    for estimator in ("k1", "k3"):
        estimate = kl_estimate_per_token(new, ref, task.mask, estimator=estimator).sum(1)
        torch.testing.assert_close((chance * estimate).sum(), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close((chance * sequence_kl(new, ref, task.mask)).sum(), exact)
    biased = (chance * kl_estimate_per_token(new, ref, task.mask, estimator="k2").sum(1)).sum()
    assert abs(float(biased - exact)) > 0.05


def mean_gradient(task: Task, policy: Policy, reference: Policy, estimator: str) -> Tensor:
    """Expected gradient of the estimate when it is used as a loss."""
    chance = probabilities(task, policy.logprobs(task)).detach()
    estimate = kl_estimate_per_token(
        policy.logprobs(task), reference.logprobs(task).detach(), task.mask, estimator=estimator
    )
    return gradient((chance[:, None] * estimate).sum(), policy)


def test_gradients_of_the_estimators_as_losses():
    """One token: k1 has none, k2 that of KL(policy || reference), k3 that of the reverse."""
    task, policy, reference = make_bandit([0.0, 0.0, 0.0]), Policy(1), Policy(2)
    forward = gradient(divergence(task, policy, reference), policy)
    reverse = gradient(divergence(task, reference, policy), policy)
    assert float(mean_gradient(task, policy, reference, "k1").abs().max()) < 1e-14
    for estimator, exact in (("k2", forward), ("k3", reverse)):
        found = mean_gradient(task, policy, reference, estimator)
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-13)
    assert float((forward - reverse).norm() / forward.norm()) > 0.1


def test_k2_per_token_misses_what_a_token_does_to_later_states(one_turn: Task):
    policy, reference = Policy(1), Policy(2)
    exact = gradient(divergence(one_turn, policy, reference), policy)
    found = mean_gradient(one_turn, policy, reference, "k2")
    assert float((found - exact).norm() / exact.norm()) > 0.01
