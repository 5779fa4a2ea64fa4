"""The biases in the table of algorithms: effects of normalizations, estimators and clips."""

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.advantages import estimate_advantages
from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.losses import compute_loss, loss_denominator
from rlhf.algorithms.registry import ALGORITHMS, configured_algorithm
from tests.algorithms.batches import batch_of
from tests.exact.enumeration import (
    BETA,
    Batches,
    Policy,
    Task,
    all_groups,
    critic,
    direction_error,
    expected_gradient,
    gradient,
    make_bandit,
    make_setting,
    objective,
    probabilities,
    relative_error,
)


def per_batch_gradient(
    algorithm: Algorithm, task: Task, batches: Batches, values: Tensor
) -> Tensor:
    """Expected gradient when every group is a batch of its own: whitening and means see only it."""
    policy, reference, _ = make_setting(task)
    old, ref = policy.logprobs(task).detach(), reference.logprobs(task).detach()
    total = torch.zeros_like(old)
    size = int((batches.groups == 0).sum())
    costs = torch.ones_like(old)
    for rows, weight in zip(
        batches.index.view(-1, size), batches.weight.view(-1, size)[:, 0], strict=True
    ):
        mask = task.mask[rows]
        batch = batch_of(
            mask,
            rewards=task.rewards[rows],
            costs=costs[rows],
            old_logprobs=old[rows],
            ref_logprobs=ref[rows],
            groups=torch.zeros(size),
            turns=task.turns[rows],
            values=values[rows],
            bootstrap=torch.zeros(size),
        )
        batch = estimate_advantages(algorithm, batch, kl_coef=BETA)
        leaf = old[rows].clone().requires_grad_()
        loss, _ = compute_loss(
            algorithm,
            leaf,
            batch,
            denominator=loss_denominator(algorithm, batch.require("loss_mask"), max_tokens=2),
            kl_coef=BETA,
        )
        total.index_add_(0, rows, weight * torch.autograd.grad(loss, leaf)[0])
    return gradient((policy.logprobs(task) * total).sum(), policy)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_table_tells_the_truth_about_bias(name: str, one_turn: Task):
    """As registered, in batches of one group of three: exact where the row claims it, else not."""
    algorithm = configured_algorithm(name, group_size=3)
    policy, reference, chance = make_setting(one_turn)
    found = per_batch_gradient(
        algorithm, one_turn, all_groups(chance, size=3), critic(one_turn, exact=False)
    )
    beta = BETA if algorithm.settings.kl_placement == "reward" else 0.0
    if algorithm.settings.kl_placement == "loss" or algorithm.loss == "pairwise":
        beta = BETA
    true = -gradient(objective(one_turn, policy, reference, beta=beta), policy)
    error = direction_error(found, true)
    if algorithm.unbiased:
        assert error < 1e-12
    else:
        assert error > 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"scale_by_std": True},
        {"aggregation": "sequence"},
        {"aggregation": "token"},
        {"whiten_advantages": True},
    ],
)
def test_each_normalization_alone_bends_the_gradient(change: dict, one_turn: Task):
    """Dr. GRPO is exact; with any one of the normalizations it left out it is not."""
    policy, reference, chance = make_setting(one_turn)
    true = -gradient(objective(one_turn, policy, reference, beta=0.0), policy)
    batches = all_groups(chance, size=3)
    values = torch.zeros_like(one_turn.rewards)
    exact = per_batch_gradient(
        configured_algorithm("dr_grpo", group_size=3), one_turn, batches, values
    )
    assert direction_error(exact, true) < 1e-12
    changed = configured_algorithm("dr_grpo", group_size=3, **change)
    assert direction_error(per_batch_gradient(changed, one_turn, batches, values), true) > 0.01


def test_batch_whitening_bends_less_the_larger_the_batch(one_turn: Task):
    policy, reference, chance = make_setting(one_turn)
    true = -gradient(objective(one_turn, policy, reference, beta=BETA), policy)
    algorithm = configured_algorithm("reinforce++", aggregation="constant")
    values = torch.zeros_like(one_turn.rewards)
    errors = [
        direction_error(
            per_batch_gradient(algorithm, one_turn, all_groups(chance, size=size), values), true
        )
        for size in (2, 3, 4)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_clipping_bends_the_gradient_off_policy():
    """Samples of an older policy: the free ratio corrects exactly, the clipped one does not."""
    task = make_bandit([-0.5, 1.0, 1.0])
    policy, behavior = Policy(1), Policy(3)
    chance = probabilities(task, behavior.logprobs(task)).detach()
    batches = all_groups(chance, size=1)
    true = -gradient(objective(task, policy, policy, beta=0.0), policy)

    def error(clip: float) -> float:
        algorithm = configured_algorithm(
            "rloo",
            advantage="return_to_go",
            num_epochs=2,
            kl_placement="none",
            clip_low=clip,
            clip_high=clip,
        )
        found = expected_gradient(
            algorithm, task, policy, policy, batches, denominator=1.0, behavior=behavior
        )
        return relative_error(found, true)

    assert error(1e6) < 1e-12
    assert error(0.2) > 0.1


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_only_k1_in_the_reward_gives_the_gradient_of_the_divergence(estimator, one_turn: Task):
    policy, reference, chance = make_setting(one_turn)
    true = -gradient(objective(one_turn, policy, reference, beta=BETA), policy)
    algorithm = configured_algorithm("rloo", group_size=2, kl_estimator=estimator)
    found = expected_gradient(
        algorithm,
        one_turn,
        policy,
        reference,
        all_groups(chance, size=2),
        denominator=2.0,
        kl_coef=BETA,
    )
    assert direction_error(found, true) > 0.02


@pytest.mark.parametrize("row", ["rloo", "gspo", "cispo"])
def test_weights_make_up_for_a_sampler_with_other_probabilities(row: str):
    """Tokens drawn by a sampler that is not the trainer's policy, as with low precision.

    One token an episode, so that the weight of a token is that of its episode.
    """
    task = make_bandit([1.0, -0.5, 2.0])
    policy, sampler, _ = make_setting(task)
    exact = gradient(objective(task, policy, policy, beta=0.0), policy)
    logprobs, drawn = policy.logprobs(task), sampler.logprobs(task).detach()
    chance = drawn[:, 0].exp()

    def found(cap: float) -> Tensor:
        settings = {"advantage": "trajectory_return", "kl_placement": "none", "tis_cap": cap}
        algorithm = configured_algorithm(row, aggregation="constant", group_size=1, **settings)
        batch = batch_of(
            task.mask,
            rewards=task.rewards,
            old_logprobs=logprobs.detach(),
            sampler_logprobs=drawn,
        )
        batch = estimate_advantages(algorithm, batch)
        leaf = logprobs.detach().clone().requires_grad_()
        loss, _ = compute_loss(algorithm, leaf, batch, denominator=1.0)
        (by_logprob,) = torch.autograd.grad(loss, leaf)
        weighted = (chance[:, None] * by_logprob).detach()
        return -gradient((policy.logprobs(task) * weighted).sum(), policy)

    assert relative_error(found(1e9), exact) < 1e-12
    assert relative_error(found(0.0), exact) > 0.1  # the sampler's policy, not ours
    assert relative_error(found(1.0), exact) > 1e-3  # what a tight cap costs
