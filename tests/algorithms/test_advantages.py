"""Hand-worked numbers, naive oracles, and poisoned slots."""

import math
import random

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.advantages import (
    best_of_group_indicator,
    discounted_returns_to_go,
    gae,
    group_relative,
    in_group_with_unequal_scores,
    is_last_token_of_turn,
    leave_one_out,
    mean_of_others,
    pair_best_and_worst_of_group,
    return_to_go_minus_group_mean,
    turn_gae,
    whiten,
)
from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.settings import Settings
from tests.algorithms.batches import batch_of

NAN = math.nan


def scored(scores: Tensor, groups: Tensor) -> TrainingBatch:
    """Episodes of one token with these scores."""
    mask = torch.ones(len(scores), 1, dtype=torch.bool)
    return batch_of(mask, rewards=scores[:, None], groups=groups)


def of_scores(estimator, scores: Tensor, groups: Tensor, **settings) -> Tensor:
    """Advantages of episodes of one token."""
    return estimator(scored(scores, groups), Settings(**settings)).advantages


def close(found: Tensor, expected: list) -> None:
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=found.dtype), equal_nan=True, rtol=1e-6, atol=1e-6
    )


def test_gae_steps_over_environment_tokens():
    mask = torch.tensor([[True, False, True]])
    rewards, values = torch.tensor([[0.0, NAN, 1.0]]), torch.tensor([[0.5, NAN, 0.25]])
    batch = batch_of(mask, rewards=rewards, values=values, bootstrap=torch.zeros(1))
    advantages, returns, *_ = gae(batch, Settings(gamma=1.0, lam=0.5))
    assert returns is not None
    # last: 1 - .25 = .75; first: .25 - .5 + .5 * .75 = .125
    close(advantages, [[0.125, 0.0, 0.75]])
    close(returns, [[0.625, 0.0, 1.0]])


def test_gae_discounts_and_bootstraps():
    mask = torch.tensor([[True, True, False], [True, True, False]])
    rewards = torch.tensor([[1.0, 2.0, NAN], [1.0, 2.0, NAN]])
    values = torch.tensor([[3.0, 4.0, NAN], [3.0, 4.0, NAN]])
    bootstrap = torch.tensor([0.0, 10.0])  # terminated, truncated
    batch = batch_of(mask, rewards=rewards, values=values, bootstrap=bootstrap)
    advantages = gae(batch, Settings(gamma=0.5, lam=0.8)).advantages
    # terminated: 2 - 4 = -2;      1 + .5*4 - 3 = 0, 0 + .4 * -2 = -.8
    # truncated:  2 + 5 - 4 = 3;   0 + .4 * 3 = 1.2
    close(advantages, [[-0.8, -2.0, 0.0], [1.2, 3.0, 0.0]])


def naive_gae(rewards, values, on, bootstrap, gamma, lam):
    """Equation 16 of Schulman et al. as a double sum over the sampled tokens of one episode."""
    index = [t for t, flag in enumerate(on) if flag]
    result = [0.0] * len(on)
    for i, t in enumerate(index):
        for j in range(i, len(index)):
            after = values[index[j + 1]] if j + 1 < len(index) else bootstrap
            delta = rewards[index[j]] + gamma * after - values[index[j]]
            result[t] += (gamma * lam) ** (j - i) * delta
    return result


@pytest.mark.parametrize("seed", range(5))
def test_gae_against_the_double_sum(seed: int):
    dice = random.Random(seed)
    gamma, lam = dice.uniform(0.5, 1), dice.uniform(0, 1)
    on = [[dice.random() < 0.6 for _ in range(9)] for _ in range(4)]
    rewards, values = ([[dice.gauss(0, 1) for _ in range(9)] for _ in range(4)] for _ in range(2))
    bootstrap = [dice.gauss(0, 1) for _ in range(4)]
    expected = [naive_gae(rewards[b], values[b], on[b], bootstrap[b], gamma, lam) for b in range(4)]
    mask, f64 = torch.tensor(on), torch.float64
    poison = [torch.where(mask, torch.tensor(x, dtype=f64), NAN) for x in (rewards, values)]
    last = torch.tensor(bootstrap, dtype=f64)
    batch = batch_of(mask, rewards=poison[0], values=poison[1], bootstrap=last)
    found, returns, *_ = gae(batch, Settings(gamma=gamma, lam=lam))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=f64), rtol=1e-12, atol=1e-12)
    plain = torch.where(mask, found + torch.tensor(values, dtype=f64), 0.0)
    torch.testing.assert_close(returns, plain, rtol=1e-12, atol=1e-12)


def test_last_of_turn():
    mask = torch.tensor([[True, True, False, True, False, True]])
    turns = torch.tensor([[0, 0, 0, 1, 9, 1]])
    assert is_last_token_of_turn(mask, turns).tolist() == [[False, True, False, False, False, True]]


def test_turn_gae_decays_between_turns_only():
    mask = torch.tensor([[True, True, False, True, True]])
    turns = torch.tensor([[0, 0, 0, 1, 1]])
    rewards = torch.tensor([[0.0, 0.0, NAN, 0.0, 8.0]])
    values = torch.where(mask, 0.0, NAN)
    batch = batch_of(mask, rewards=rewards, values=values, turns=turns, bootstrap=torch.zeros(1))
    settings = Settings(gamma=1.0, lam=1.0, turn_gamma=0.5, turn_lam=0.5)
    close(turn_gae(batch, settings).advantages, [[2.0, 2.0, 0.0, 8.0, 8.0]])


def test_turn_gae_discounts_the_bootstrap_as_a_turn():
    one = torch.ones(1, 1, dtype=torch.bool)
    zero = torch.zeros(1, 1)
    turns = torch.zeros(1, 1, dtype=torch.long)
    batch = batch_of(one, rewards=zero, values=zero, turns=turns, bootstrap=torch.ones(1))
    settings = Settings(gamma=1.0, lam=1.0, turn_gamma=0.25, turn_lam=1.0)
    close(turn_gae(batch, settings).advantages, [[0.25]])


def test_returns():
    mask = torch.tensor([[True, False, True, True]])
    rewards = torch.tensor([[1.0, NAN, 2.0, 4.0]])
    close(batch_of(mask, rewards=rewards).scores(), [7.0])
    close(discounted_returns_to_go(rewards, mask, gamma=0.5), [[3.0, 0.0, 4.0, 4.0]])
    close(batch_of(mask, rewards=torch.tensor([[1.0, 0.0, NAN, 0.0]])).scores(), [NAN])


def test_group_relative():
    scores = torch.tensor([1.0, 5.0, 3.0, 7.0, NAN])
    groups = torch.tensor([8, 2, 8, 2, 8])
    close(
        of_scores(group_relative, scores, groups, scale_by_std=False),
        [-1.0, -1.0, 1.0, 1.0, 0.0],
    )
    scaled = 1 / (math.sqrt(2) + 1e-4)  # sample deviation of two points 2 apart
    close(
        of_scores(group_relative, scores, groups, scale_by_std=True),
        [-scaled, -scaled, scaled, scaled, 0],
    )


def test_equal_scores_give_exactly_zero_even_after_rounding():
    scores = torch.full((7,), 0.1)
    for scale_by_std in (False, True):
        found = group_relative(
            scored(scores, torch.zeros(7)), Settings(scale_by_std=scale_by_std)
        ).advantages
        assert (found == 0).all()


def test_leave_one_out():
    scores = torch.tensor([1.0, 3.0, 8.0, NAN, 5.0])
    groups = torch.tensor([0, 0, 0, 0, 1])
    close(mean_of_others(scores, groups), [5.5, 4.5, 2.0, 4.0, NAN])
    close(of_scores(leave_one_out, scores, groups), [-4.5, -1.5, 6.0, 0.0, 0.0])


def test_group_return_to_go():
    """Two turns; the second episode stops after its first turn; the fourth is unscored."""
    mask = torch.tensor([[True, True, False, True]] * 4)
    mask[1, 3] = False
    turns = torch.tensor([[0, 0, 0, 1]] * 4)
    rewards = torch.tensor(
        [[0.0, 1.0, NAN, 4.0], [0.0, 2.0, NAN, NAN], [0.0, 3.0, NAN, 6.0], [0.0, NAN, NAN, 9.0]]
    )
    batch = batch_of(mask, rewards=rewards, turns=turns, groups=torch.zeros(4))
    found = return_to_go_minus_group_mean(batch, Settings(gamma=1.0)).advantages
    # turn 0 returns to go: 5, 2, 9; turn 1: 4, -, 6
    close(found, [[-0.5, -0.5, 0, -2], [-5, -5, 0, 0], [5.5, 5.5, 0, 2], [0, 0, 0, 0]])


def test_a_turn_that_one_episode_alone_reached_has_no_baseline():
    mask = torch.tensor([[True, True], [True, False]])
    turns = torch.tensor([[0, 1], [0, 0]])
    rewards = torch.tensor([[1.0, 4.0], [2.0, NAN]])
    batch = batch_of(mask, rewards=rewards, turns=turns, groups=torch.zeros(2))
    found = return_to_go_minus_group_mean(batch, Settings(gamma=0.5)).advantages
    close(found, [[1.0, 4.0], [-1.0, 0.0]])  # 1 + .5 * 4 - 2; 4; 2 - 3


def test_best_of_group_shares_ties_and_drops_groups_without_a_winner():
    scores = torch.tensor([1.0, 3.0, 3.0, NAN, 2.0, 2.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    close(of_scores(best_of_group_indicator, scores, groups), [0.0, 0.5, 0.5, 0.0, 0.0, 0.0])


def test_scores_that_differ_by_rounding_are_equal():
    """Group 0 has the same rewards in two orders, group 1 a real difference, group 2 no score."""
    exact = [sum(row) for row in ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1])]
    assert exact[0] != exact[1]  # 0.6 in both orders, but not in float64
    scores = torch.tensor([*exact, 1.0, 1.0001, NAN, NAN, 0.0, 0.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert (
        in_group_with_unequal_scores(scores, groups).tolist()
        == [False] * 2 + [True] * 2 + [False] * 4
    )
    close(of_scores(best_of_group_indicator, scores, groups), [0, 0, 0, 1.0, 0, 0, 0, 0])
    pairs = pair_best_and_worst_of_group(scored(scores, groups), Settings())
    assert pairs.included is not None
    assert pairs.included.tolist() == [False] * 2 + [True] * 2 + [False] * 4
    shares = of_scores(best_of_group_indicator, torch.tensor([1e7, 1e7 + 1, 2.0]), torch.zeros(3))
    close(shares, [0.5, 0.5, 0.0])


def test_best_and_worst():
    scores = torch.tensor([3.0, 1.0, NAN, 3.0, 1.0, 2.0, 2.0])
    groups = torch.tensor([4, 4, 4, 4, 4, 7, 7])
    pairs = pair_best_and_worst_of_group(scored(scores, groups), Settings())
    close(pairs.advantages, [2.0, -2.0, 0, 0, 0, 0, 0])
    assert pairs.pair_ids is not None
    assert pairs.included is not None
    assert pairs.pair_ids.tolist() == [0, 0, 2, 3, 4, 5, 6]
    assert pairs.included.tolist() == [True, True, False, False, False, False, False]


def test_informative_groups():
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, NAN, 1.0, NAN, NAN])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert (
        in_group_with_unequal_scores(scores, groups).tolist()
        == [False] * 2 + [True] * 2 + [False] * 4
    )


def test_whiten():
    values = torch.tensor([[1.0, NAN, 3.0], [5.0, NAN, 7.0]])
    mask = ~values.isnan()
    deviation = math.sqrt(5)  # biased: (9 + 1 + 1 + 9) / 4
    shifted = [[-3 / deviation, 0, -1 / deviation], [1 / deviation, 0, 3 / deviation]]
    close(whiten(values, mask), shifted)
