"""Rollouts, batches and seeds on hand-made numbers."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rollout.batch import Rollout, collate
from rlhf.rollout.seeds import evaluation_seed, training_seed
from tests.helpers.models import tiny_rollouts

CPU = torch.device("cpu")


def two_turns() -> Rollout:
    """Prompt of two, a reply of two, an observation of one, a reply of one."""
    rollout = Rollout(seed=4, group_index=1, sample_index=0)
    rollout.append([10, 11], turn=0, logprobs=None)
    rollout.append([12, 13], turn=0, logprobs=[-0.5, -0.25])
    rollout.append([14], turn=1, logprobs=None)
    rollout.append([15], turn=1, logprobs=[-1.5])
    return rollout


def test_every_list_describes_its_token():
    rollout = two_turns()
    assert rollout.tokens == [10, 11, 12, 13, 14, 15]
    assert rollout.is_action == [False, False, True, True, False, True]
    assert rollout.logprobs == [0.0, 0.0, -0.5, -0.25, 0.0, -1.5]
    assert rollout.turn == [0, 0, 0, 0, 1, 1]
    assert rollout.env_rewards == rollout.costs == [0.0] * 6
    assert (rollout.num_sampled_tokens, rollout.num_turns) == (3, 2)


def test_observation_after_last_reply_is_not_a_turn():
    rollout = two_turns()
    rollout.append([16, 17], turn=2, logprobs=None)
    assert rollout.num_turns == 2
    prompt_only = Rollout(seed=0, group_index=0, sample_index=0)
    prompt_only.append([1, 2], turn=0, logprobs=None)
    assert prompt_only.num_turns == 0


def test_terminal_reward_is_on_last_sampled_token():
    rollout = two_turns()
    rollout.append([16, 17], turn=2, logprobs=None)  # the last state of a truncated episode
    rollout.env_rewards[3] = 1.0
    rollout.rewards = rollout.with_terminal_reward(rollout.env_rewards, 2.0)
    rollout.rewards = rollout.with_terminal_reward(rollout.rewards, 0.5)
    assert rollout.rewards == [0, 0, 0, 1.0, 0, 2.5, 0, 0]
    assert rollout.score == 3.5
    assert rollout.env_rewards == [0, 0, 0, 1.0, 0, 0, 0, 0]
    assert rollout.env_return == 1.0


def test_an_episode_that_cannot_be_scored_is_nan():
    rollout = two_turns()
    rollout.rewards = rollout.with_terminal_reward(rollout.env_rewards, None)
    assert math.isnan(rollout.score)


def test_collate_pads_on_the_right():
    short = Rollout(seed=0, group_index=3, sample_index=1, truncated=True)
    short.append([20], turn=0, logprobs=None)
    short.append([21], turn=0, logprobs=[-2.0])
    short.costs[1] = 7.0
    batch = collate([two_turns(), short], [[0.0] * 6, [0.0, 5.0]], pad_id=99, device=CPU)
    assert len(batch) == 2
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 14, 15], [20, 21, 99, 99, 99, 99]]
    assert batch.attention_mask.sum(1).tolist() == [6, 2]
    assert batch.attention_mask[1].tolist() == [True, True, False, False, False, False]
    assert batch.action_mask[1].tolist() == [False, True, False, False, False, False]
    assert batch.sampler_logprobs[1].tolist() == [0, -2, 0, 0, 0, 0]
    assert batch.rewards[1].tolist() == [0, 5, 0, 0, 0, 0]
    assert batch.costs[1].tolist() == [0, 7, 0, 0, 0, 0]
    assert batch.turns.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, -1, -1, -1, -1]]
    assert batch.groups.tolist() == [1, 3]
    assert batch.truncated.tolist() == [False, True]


def test_a_pad_token_in_the_text_is_a_token():
    rollout = two_turns()
    rollout.tokens[2] = 99
    batch = collate([rollout], [rollout.env_rewards], pad_id=99, device=CPU)
    assert batch.attention_mask.all()
    assert batch.action_mask[0, 2]


@pytest.mark.parametrize("index", [[1], [2, 0], [1, 1], [0, 1, 2]])
def test_rows_are_the_batch_of_those_episodes(index):
    rollouts = tiny_rollouts((9, 5, 12))
    rewards = [rollout.env_rewards for rollout in rollouts]
    batch = collate(rollouts, rewards, pad_id=0, device=CPU).select(torch.tensor(index))
    alone = collate([rollouts[i] for i in index], [rewards[i] for i in index], pad_id=0, device=CPU)
    for name, expected in vars(alone).items():
        found = getattr(batch, name)
        assert found is expected is None or torch.equal(found, expected), name


@given(
    run=st.integers(0, 2**40),
    counter=st.integers(0, 2**40),
    index=st.integers(0, 2**30 - 1),
)
def test_training_never_sees_a_start_state_of_evaluation(run, counter, index):
    training, evaluation = training_seed(run, counter), evaluation_seed(index)
    assert 0 <= training < 2**30 <= evaluation < 2**31


@given(st.integers(0, 2**20), st.integers(0, 2**20), st.integers(1, 1000))
def test_a_run_visits_start_states_once_each(run, counter, count):
    seeds = {training_seed(run, counter + i) for i in range(count)}
    assert len(seeds) == count


def test_runs_start_far_apart():
    starts = sorted(training_seed(run, 0) for run in range(20))
    assert min(b - a for a, b in pairwise(starts)) > 1_000_000
