"""Where the algorithms converge: pi*(y) ~ pi_ref(y) exp(r(y) / beta), or another computed point."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.algorithms.controllers import LagrangeMultiplier
from rlhf.algorithms.losses import pairwise_dpo_loss
from rlhf.algorithms.registry import ALGORITHMS, configured_algorithm
from rlhf.algorithms.settings import Settings
from tests.algorithms.batches import batch_of
from tests.exact.enumeration import Policy, Task, gradient, make_bandit, make_task, probabilities
from tests.exact.training import (
    Tabular,
    descend,
    optimum,
    tilted,
    total_variation,
    train_in_batches,
    train_in_expectation,
)

BETA = 0.7
IN_REWARD = {"kl_placement": "reward", "kl_estimator": "k1"}
GROUPED = {
    "rloo": configured_algorithm("rloo", group_size=2),
    "dr_grpo, KL in the reward": configured_algorithm("dr_grpo", group_size=2, **IN_REWARD),
    "grpo, KL in the reward, no std": configured_algorithm(
        "grpo", group_size=2, scale_by_std=False, **IN_REWARD
    ),
    "grpo, KL in the reward": configured_algorithm("grpo", group_size=2, **IN_REWARD),
    "online_dpo": configured_algorithm("online_dpo"),
}


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("seed", [0, 1])
def test_groups_reach_the_optimum(case: str, seed: int):
    task, reference = make_task(num_turns=1, seed=seed), Policy(seed + 2)
    final = train_in_expectation(
        GROUPED[case], task, reference, kl_coef=BETA, group_size=2, steps=300, lr=0.1
    )
    assert total_variation(final, optimum(task, reference, beta=BETA)) < 0.002


@pytest.mark.parametrize("name", ["ppo", "reinforce++"])
@pytest.mark.parametrize("seed", [0, 1])
def test_whole_batches_reach_the_optimum(name: str, seed: int):
    """With the row's own whitening, clipping, lambda and learned critic."""
    task, reference = make_task(num_turns=1, seed=seed), Policy(seed + 2)
    final = train_in_batches(
        configured_algorithm(name), task, reference, kl_coef=BETA, steps=300, lr=0.05
    )
    assert total_variation(final, optimum(task, reference, beta=BETA)) < 0.01


def test_the_start_is_far_from_the_optimum(one_turn: Task):
    reference = Policy(2)
    start = probabilities(one_turn, reference.logprobs(one_turn)).detach()
    assert total_variation(start, optimum(one_turn, reference, beta=BETA)) > 0.3


def test_offline_dpo_on_infinite_bradley_terry_data(one_turn: Task):
    """All ordered pairs of reference episodes, weighted by the chance of the pair and of its label,
    with hard labels: the same optimum."""
    reference, policy = Policy(2), Policy(2)
    chance = probabilities(one_turn, reference.logprobs(one_turn)).detach()
    better, worse = (
        side.flatten() for side in torch.meshgrid(2 * [torch.arange(7)], indexing="ij")
    )
    labeled = (one_turn.returns[better] - one_turn.returns[worse]).sigmoid()
    weight = chance[better] * chance[worse] * labeled
    rows = torch.stack([better, worse], dim=1).flatten()
    pair_ids = torch.arange(49).repeat_interleave(2)
    preferred = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(49)
    ref = reference.logprobs(one_turn).detach()[rows]

    def gradient_of() -> Tensor:
        leaf = policy.logprobs(one_turn).detach()[rows].requires_grad_()
        mask = one_turn.mask[rows]
        batch = batch_of(
            mask,
            ref_logprobs=ref,
            advantages=torch.where(mask, preferred[:, None], 0.0),
            pair_ids=pair_ids,
        )
        settings = Settings(kl_coef=BETA, pair_labels="hard")
        loss, _ = pairwise_dpo_loss(leaf, batch, settings, denominator=1.0)
        by_logprob = torch.autograd.grad(loss, leaf)[0] * weight.repeat_interleave(2)[:, None]
        per_episode = torch.zeros_like(one_turn.rewards).index_add_(0, rows, by_logprob)
        return gradient((policy.logprobs(one_turn) * per_episode).sum(), policy)

    descend(policy, gradient_of, steps=300, lr=0.1)
    final = probabilities(one_turn, policy.logprobs(one_turn)).detach()
    assert total_variation(final, optimum(one_turn, reference, beta=BETA)) < 0.002


# Algorithms with another fixed point, on a bandit whose points have closed or simple forms.
BANDIT = make_bandit([1.0, 0.6, 0.0, -0.4])
REFERENCE = Tabular(torch.tensor([0.1, 0.3, 0.4, 0.2], dtype=torch.float64))
SIZE = 3  # group size
BETA_BANDIT = 1.0
GREEDY = ["dr_grpo", "dapo", "gspo", "cispo", "best_of_n"]  # no divergence by default


def bandit_run(name: str, *, beta: float = BETA_BANDIT, **settings: object) -> Tensor:
    algorithm = configured_algorithm(name, group_size=SIZE, **settings)
    return train_in_batches(
        algorithm,
        BANDIT,
        REFERENCE,
        kl_coef=beta,
        steps=300,
        lr=0.05,
        group_size=SIZE if algorithm.needs_groups else 1,
        num_groups=4000 if algorithm.needs_groups else 1000,
    )


def distance_from_optimum(final: Tensor) -> float:
    return total_variation(final, optimum(BANDIT, REFERENCE, beta=BETA_BANDIT))


def test_k3_as_a_loss_has_its_own_fixed_point():
    """Stationary where pi (c r - c mean r) + beta (ref - pi) = 0, c = (G - 1) / G: a mixture-like
    pi = beta ref / (mu - c r) instead of the exponential."""
    scale = (SIZE - 1) / SIZE
    reference = REFERENCE.logits.detach().exp()
    low = float((scale * BANDIT.returns).max())
    high = low + BETA_BANDIT
    for _ in range(100):
        mu = (low + high) / 2
        total = float((BETA_BANDIT * reference / (mu - scale * BANDIT.returns)).sum())
        low, high = (mu, high) if total > 1 else (low, mu)
    computed = BETA_BANDIT * reference / (low - scale * BANDIT.returns)
    final = bandit_run("dr_grpo", kl_placement="loss", kl_estimator="k3")
    assert total_variation(final, computed) < 0.002
    assert distance_from_optimum(final) == pytest.approx(0.065, abs=0.002)


def test_k2_as_a_loss_is_the_divergence_itself():
    """On one token; the group's own share in its mean makes the reward count (G - 1) / G."""
    computed = tilted(BANDIT, REFERENCE, (SIZE - 1) / SIZE * BANDIT.returns / BETA_BANDIT)
    final = bandit_run("dr_grpo", kl_placement="loss", kl_estimator="k2")
    assert total_variation(final, computed) < 0.002


def test_grpo_has_its_own_fixed_point():
    """Standardized advantages and k3 in the loss: against an independent flow in numpy."""
    returns, reference = BANDIT.returns.numpy(), REFERENCE.logits.detach().exp().numpy()
    groups = np.stack(np.meshgrid(*SIZE * [np.arange(4)], indexing="ij"), -1).reshape(-1, SIZE)
    scores = returns[groups]
    spread = scores.std(1, ddof=1)
    standard = (scores[:, 0] - scores.mean(1)) / np.where(spread > 0, spread + 1e-4, 1.0)
    logits = np.log(reference)
    for _ in range(20_000):
        policy = np.exp(logits) / np.exp(logits).sum()
        others = policy[groups[:, 1:]].prod(1)
        merit = np.array([(standard * others)[groups[:, 0] == y].sum() for y in range(4)])
        flow = policy * (merit - policy @ merit) + BETA_BANDIT * (reference - policy)
        logits = logits + flow
        if np.abs(flow).max() < 1e-12:
            break
    final = bandit_run("grpo")
    assert total_variation(final, torch.tensor(policy)) < 0.002


def spread_under_tilt(sigma: float, beta: float) -> float:
    """Deviation of group-centered returns under ref exp(c r / (sigma beta)), c = (G - 1) / G."""
    scale = (SIZE - 1) / SIZE
    policy = tilted(BANDIT, REFERENCE, scale * BANDIT.returns / (sigma * beta))
    mean = (policy * BANDIT.returns).sum()
    return float((scale * (policy * (BANDIT.returns - mean) ** 2).sum()).sqrt())


def test_reinforce_baseline_has_its_own_fixed_point():
    """Whitened advantages beside an unwhitened divergence: pi ~ ref exp(c r / (sigma beta)) with
    sigma the deviation under pi itself. Below some beta no such sigma is left: pi collapses."""
    beta, low, high = BETA_BANDIT, 0.2, 1.0
    for _ in range(100):
        sigma = (low + high) / 2
        low, high = (sigma, high) if spread_under_tilt(sigma, beta) > sigma else (low, sigma)
    computed = tilted(BANDIT, REFERENCE, (SIZE - 1) / SIZE * BANDIT.returns / (sigma * beta))
    final = bandit_run("reinforce++-baseline", beta=beta)
    assert total_variation(final, computed) < 0.01
    assert all(spread_under_tilt(sigma / 100, 0.7) < sigma / 100 for sigma in range(3, 200))


def documented() -> dict[str, float]:
    """The last column of the table "Fixed points" in docs/algorithms.md."""
    page = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    section = page.split("## Fixed points")[1].split("## ")[0]
    return {
        name: float(distance)
        for name, distance in re.findall(r"^\| `(\S+)` \|.*\| ([\d.]+) \|$", section, re.M)
    }


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "ppo_lagrangian"])
def test_the_documented_distance_from_the_optimum(name: str):
    if name in GREEDY:
        distance = 1 - float(optimum(BANDIT, REFERENCE, beta=BETA_BANDIT)[0])
    else:
        distance = distance_from_optimum(bandit_run(name))
    assert distance == pytest.approx(documented()[name], abs=0.005)


@pytest.mark.parametrize("name", GREEDY)
def test_without_divergence_the_best_action_takes_all(name: str):
    assert float(bandit_run(name)[0]) > 0.95


def test_hard_labels_run_past_the_optimum():
    final = bandit_run("online_dpo", pair_labels="hard")
    best = optimum(BANDIT, REFERENCE, beta=BETA_BANDIT)[0]
    assert float(final[0]) > float(best) + 0.1


def test_lagrangian_reaches_the_constrained_optimum():
    """max E[r] - beta KL with E[cost] <= 0.2: pi ~ ref exp((r - v cost) / beta), v by bisection."""
    costs = torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64)[:, None]
    low, high = 0.0, 50.0
    for _ in range(100):
        price = (low + high) / 2
        computed = tilted(BANDIT, REFERENCE, (BANDIT.returns - price * costs[:, 0]) / BETA_BANDIT)
        cost = float((computed * costs[:, 0]).sum())
        low, high = (price, high) if cost > 0.2 else (low, price)
    free = optimum(BANDIT, REFERENCE, beta=BETA_BANDIT)
    assert float((free * costs[:, 0]).sum()) > 0.3
    multiplier = LagrangeMultiplier(value=1.0, limit=0.2, lr=0.2, maximum=100.0)
    final = train_in_batches(
        configured_algorithm("ppo_lagrangian"),
        BANDIT,
        REFERENCE,
        kl_coef=BETA_BANDIT,
        steps=600,
        lr=0.05,
        costs=costs,
        multiplier=multiplier,
    )
    assert total_variation(final, computed) < 0.01
    assert multiplier.value == pytest.approx(price, rel=0.05)
    assert float((final * costs[:, 0]).sum()) == pytest.approx(0.2, abs=0.005)
