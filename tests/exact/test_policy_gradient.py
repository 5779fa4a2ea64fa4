"""Each (loss, advantage) pair against the policy gradient enumerated over all episodes."""

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.advantages import estimate_advantages
from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.registry import configured_algorithm
from tests.algorithms.batches import batch_of
from tests.exact.enumeration import (
    BETA,
    Task,
    all_groups,
    critic,
    direction_error,
    expected_gradient,
    gradient,
    make_setting,
    objective,
    poisoned,
    relative_error,
)


def test_enumeration_is_complete(one_turn: Task, two_turns: Task):
    assert len(one_turn.tokens) == 7
    assert len(two_turns.tokens) == 1 + 6 * 2 * 7  # an empty first turn quits
    for task in (one_turn, two_turns):
        torch.testing.assert_close(float(make_setting(task)[2].sum()), 1.0)


ROW_OF_LOSS = {
    "clipped": "rloo",
    "clipped_sequence": "gspo",
    "clipped_weight": "cispo",
    "likelihood": "best_of_n",
}
SCALE_OF_ADVANTAGE = {
    "trajectory_return": 1.0,
    "return_to_go": 1.0,
    "leave_one_out": 1.0,
    "group_return_to_go": 1.0,
    "group_relative": 0.5,  # (G - 1) / G
    "gae": 1.0,
    "turn_gae": 1.0,
}


@pytest.mark.parametrize("loss", ROW_OF_LOSS)
@pytest.mark.parametrize("advantage", SCALE_OF_ADVANTAGE)
@pytest.mark.parametrize("turns", [1, 2])
def test_every_pair_is_unbiased(
    loss: str, advantage: str, turns: int, one_turn: Task, two_turns: Task
):
    """Groups of two, KL in the reward: the mean gradient is that of E[R] - beta KL. The critic is
    wrong, and lambda 1."""
    own = {
        "group_relative": {"scale_by_std": False},
        "gae": {"lam": 1.0},
        "turn_gae": {"lam": 1.0, "turn_lam": 1.0},
    }
    algorithm = configured_algorithm(
        ROW_OF_LOSS[loss],
        advantage=advantage,
        group_size=2,
        aggregation="constant",
        kl_placement="reward",
        **own.get(advantage, {}),
    )
    assert algorithm.loss == loss
    task = one_turn if turns == 1 else two_turns
    policy, reference, chance = make_setting(task)
    found = expected_gradient(
        algorithm,
        task,
        policy,
        reference,
        all_groups(chance, size=2),
        denominator=2.0,
        kl_coef=BETA,
        values=critic(task, exact=False),
    )
    exact = gradient(objective(task, policy, reference, beta=BETA), policy)
    assert relative_error(found, -SCALE_OF_ADVANTAGE[advantage] * exact) < 1e-12


@pytest.mark.parametrize("size", [3, 4])
def test_unbiased_in_larger_groups(size: int, one_turn: Task):
    policy, reference, chance = make_setting(one_turn)
    exact = -gradient(objective(one_turn, policy, reference, beta=BETA), policy)
    batches = all_groups(chance, size=size)
    scales = {"leave_one_out": 1.0, "group_return_to_go": 1.0, "group_relative": (size - 1) / size}
    for advantage, scale in scales.items():
        algorithm = configured_algorithm("rloo", advantage=advantage, group_size=size)
        found = expected_gradient(
            algorithm, one_turn, policy, reference, batches, denominator=size, kl_coef=BETA
        )
        assert relative_error(found, scale * exact) < 1e-12


def ppo(**overrides: object) -> Algorithm:
    return configured_algorithm("ppo", whiten_advantages=False, aggregation="constant", **overrides)


def ppo_gradient(task: Task, algorithm: Algorithm, values: Tensor) -> tuple[Tensor, Tensor]:
    policy, reference, chance = make_setting(task)
    found = expected_gradient(
        algorithm,
        task,
        policy,
        reference,
        all_groups(chance, size=1),
        denominator=1.0,
        kl_coef=BETA,
        values=values,
    )
    return found, -gradient(objective(task, policy, reference, beta=BETA), policy)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize(
    ("overrides", "exact"),
    [
        ({"lam": 1.0}, False),
        ({"lam": 0.3}, True),
        ({"advantage": "turn_gae", "lam": 1.0, "turn_lam": 1.0}, False),
        ({"advantage": "turn_gae", "lam": 0.5, "turn_lam": 0.2}, True),
    ],
)
def test_ppo_is_unbiased(turns, overrides, exact, one_turn: Task, two_turns: Task):
    """With lambda 1 under any critic, and with any lambda under the exact one."""
    task = one_turn if turns == 1 else two_turns
    found, true = ppo_gradient(task, ppo(**overrides), critic(task, exact=exact))
    assert relative_error(found, true) < 1e-12


@pytest.mark.parametrize("advantage", ["gae", "turn_gae"])
def test_lambda_below_one_inherits_the_error_of_the_critic(advantage: str, two_turns: Task):
    algorithm = ppo(advantage=advantage, lam=0.9)
    found, true = ppo_gradient(two_turns, algorithm, critic(two_turns, exact=False))
    assert direction_error(found, true) > 0.02


def test_truncation_bootstraps_to_the_gradient_of_the_whole_episode(two_turns: Task):
    """Episodes cut after the first turn, with the exact value of the state they were cut in, give
    the first turn's part of the full gradient; calling them terminated does not."""
    policy, reference, chance = make_setting(two_turns)
    first = two_turns.mask & (two_turns.turns == 0)
    values = critic(two_turns, exact=True)
    second_start = (two_turns.mask & (two_turns.turns == 1)).int().argmax(1)
    continues = (two_turns.turns == 1).any(1)
    bootstrap = torch.where(continues, values.gather(1, second_start[:, None])[:, 0], 0.0)
    old = poisoned(policy.logprobs(two_turns).detach(), first)
    ref = poisoned(reference.logprobs(two_turns).detach(), first)
    algorithm = ppo(lam=1.0)

    def first_turn_gradient(bootstrap: Tensor) -> Tensor:
        wrong = critic(two_turns, exact=False)
        batch = batch_of(
            first,
            rewards=two_turns.rewards,
            old_logprobs=old,
            ref_logprobs=ref,
            values=wrong,
            bootstrap=bootstrap,
        )
        batch = estimate_advantages(algorithm, batch, kl_coef=BETA)
        logprobs = torch.where(first, policy.logprobs(two_turns), 0.0)
        return gradient((chance[:, None] * batch.require("advantages") * logprobs).sum(), policy)

    penalty = BETA * (policy.logprobs(two_turns) - reference.logprobs(two_turns)).detach()
    net = torch.where(two_turns.mask, two_turns.rewards - penalty, 0.0)
    full = net.flip(1).cumsum(1).flip(1)
    logprobs = torch.where(first, policy.logprobs(two_turns), 0.0)
    true = gradient((chance[:, None] * full * logprobs).sum(), policy)
    assert relative_error(first_turn_gradient(bootstrap), true) < 1e-12
    assert direction_error(first_turn_gradient(torch.zeros_like(bootstrap)), true) > 0.02


def test_best_of_n_imitates_the_best_of_n_policy(one_turn: Task):
    """Mean gradient = that of the cross-entropy to the best of three, where not all three agree."""
    policy, reference, chance = make_setting(one_turn)
    found = expected_gradient(
        configured_algorithm("best_of_n", group_size=3, aggregation="constant"),
        one_turn,
        policy,
        reference,
        all_groups(chance, size=3),
        denominator=1.0,
    )
    below = (one_turn.returns[None, :] < one_turn.returns[:, None]).double() @ chance
    best = (below + chance) ** 3 - below**3 - chance**3
    logprobs = torch.where(one_turn.mask, policy.logprobs(one_turn), 0.0).sum(1)
    assert relative_error(found, gradient(-(best * logprobs).sum(), policy)) < 1e-12


def test_per_turn_index_baseline_gives_stopping_no_credit():
    """A turn in which nothing is paid, then one that pays 1, if the policy goes on (p = sigma(.3)).

    d/dtheta p = p (1 - p) = 0.2445. Comparing each turn's reward with the group's at that turn
    gives 0; the return to go with the others' as baseline gives the truth.
    """
    theta = torch.tensor(0.3, dtype=torch.float64)
    go_on = float(theta.sigmoid())
    chance = torch.tensor([go_on, 1 - go_on], dtype=torch.float64)
    score = torch.tensor([1 - go_on, -go_on], dtype=torch.float64)  # d log pi / d theta
    mask = torch.tensor([[True, True], [True, False]])
    rewards = torch.tensor([[0.0, 1.0], [0.0, torch.nan]], dtype=torch.float64)
    turns = torch.tensor([[0, 1], [0, 0]])
    batches = all_groups(chance, size=3)
    rows = batches.index
    batch = estimate_advantages(
        configured_algorithm("rloo", advantage="group_return_to_go", group_size=3),
        batch_of(mask[rows], rewards=rewards[rows], groups=batches.groups, turns=turns[rows]),
    )
    found = (batches.weight * batch.require("advantages")[:, 0] * score[rows]).sum() / 3
    assert float(found) == pytest.approx(0.2444583, abs=1e-7)

    in_groups = rewards[rows].view(-1, 3, 2)
    per_turn = in_groups - in_groups.nanmean(dim=1, keepdim=True)
    trap = (batches.weight * per_turn.view(-1, 2)[:, 0] * score[rows]).sum() / 3
    assert float(trap) == 0.0
