"""Metrics of the scores of a step, by hand: variance, its sources, groups and solved episodes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlhf.reward_models import build
from rlhf.reward_models.core import PerConversationReward
from rlhf.rollout.batch import Rollout
from rlhf.training.score_metrics import is_solved, score_metrics
from rlhf.training.scoring import score_rollouts


def rollout(score: float, *, group: int = 0, **fields: Any) -> Rollout:
    """An episode of one token with this score."""
    made = Rollout(0, group, 0, tokens=[1], is_action=[True], env_rewards=[0.0], **fields)
    made.rewards = [score]
    return made


def binary(
    name: str, *, outcomes: tuple[float, float] | None = (0.0, 1.0)
) -> PerConversationReward:
    """A reward that reads its score from the first message."""
    return PerConversationReward(lambda talk: talk[0][name], name=name, outcomes=outcomes)


def scored(reward: Any, rows: list[dict[str, float]], *, env_weight: float = 0.0) -> list[Rollout]:
    """Episodes whose rewards have these scores; the key env is the return of the environment."""
    rollouts = []
    for row in rows:
        made = rollout(0.0, conversation=[{"role": "user", "content": "", **row}])
        made.env_rewards = [row.get("env", 0.0)]
        rollouts.append(made)
    score_rollouts(rollouts, rewards=reward, gold=None, env_weight=env_weight)
    return rollouts


def test_deviations_and_equal_groups_by_hand() -> None:
    """Group 0 has the scores 0 and 2, group 1 only 5, group 2 one score; an episode has none."""
    rollouts = [
        rollout(0.0),
        rollout(2.0),
        *(rollout(5.0, group=1) for _ in range(3)),
        rollout(7.0, group=2),
        rollout(math.nan, group=2),
    ]
    metrics = score_metrics(rollouts, reward=None, env_weight=1.0)
    # The mean of 0, 2, 5, 5, 5, 7 is 4, and the sum of squares 16 + 4 + 3 + 9.
    assert metrics == {
        "rewards/std": pytest.approx(math.sqrt(32 / 6)),
        "groups/std": pytest.approx(0.5),
        "groups/equal": 0.5,
    }


def test_scores_that_differ_by_rounding_are_equal() -> None:
    rollouts = [rollout(0.1 + 0.2), rollout(0.3), rollout(0.3)]
    metrics = score_metrics(rollouts, reward=None, env_weight=1.0)
    assert metrics == {"rewards/std": 0.0, "groups/std": 0.0, "groups/equal": 1.0}


def test_episodes_without_scores_have_no_metrics() -> None:
    assert score_metrics([rollout(math.nan)], reward=None, env_weight=1.0) == {}
    assert score_metrics([], reward=None, env_weight=1.0) == {}


def test_groups_in_which_every_episode_or_none_is_solved() -> None:
    solved = [[True, True], [False, False], [False, True], [False, False], [True, None]]
    rollouts = [
        rollout(1.0, group=group, success=value)
        for group, values in enumerate(solved)
        for value in values
    ]
    metrics = score_metrics(rollouts, reward=None, env_weight=1.0)
    assert metrics["rollout/success"] == pytest.approx(4 / 9)
    assert metrics["groups/all_solved"] == 1 / 4  # the last group is not known
    assert metrics["groups/none_solved"] == 2 / 4
    assert metrics["groups/equal"] == 1.0


@pytest.mark.parametrize(
    ("change", "scores", "solved"),
    [
        (lambda a, b: a, {"a": 1.0, "b": 0.0}, True),
        (lambda a, b: a + b, {"a": 1.0, "b": 0.0}, False),
        (lambda a, b: a + 0.2 * b, {"a": 1.0, "b": 1.0}, True),
        (lambda a, b: a - b, {"a": 1.0, "b": 0.0}, True),  # a penalty: 0 is the better score
        (lambda a, b: a - b, {"a": 1.0, "b": 1.0}, False),
        (lambda a, b: a * b, {"a": 1.0, "b": 1.0}, None),  # more than one score decides
        (lambda a, b: a.clip(-1, 0), {"a": 1.0, "b": 1.0}, None),  # always 0
        (lambda a, b: binary("a", outcomes=None), {"a": 1.0, "b": 1.0}, None),
    ],
)
def test_a_reward_with_two_possible_scores_tells_whether_an_episode_is_solved(
    change: Any, scores: dict[str, float], solved: bool | None
) -> None:
    reward = change(binary("a"), binary("b"))
    (made,) = scored(reward, [scores])
    assert is_solved(made, reward) is solved
    made.success = False  # the report of the environment decides
    assert is_solved(made, reward) is False


def test_variance_shares_by_hand() -> None:
    """The variances of 3a, b and env are 9/4, 1 and 0."""
    reward = 3 * binary("a") + binary("b")
    rows = [{"a": 0.0, "b": -1.0, "env": 4.0}, {"a": 1.0, "b": 1.0, "env": 4.0}]
    rollouts = scored(reward, rows, env_weight=2.0)
    metrics = score_metrics(rollouts, reward=reward, env_weight=2.0)
    assert metrics["rewards/variance_share/a"] == pytest.approx(9 / 13)
    assert metrics["rewards/variance_share/b"] == pytest.approx(4 / 13)
    assert metrics["rewards/variance_share/env"] == 0.0
    without = score_metrics(rollouts, reward=reward, env_weight=0.0)
    assert "rewards/variance_share/env" not in without
    alone = score_metrics(rollouts, reward=binary("a"), env_weight=0.0)
    assert not any(key.startswith("rewards/variance_share/") for key in alone)


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: a + 2 * b.clip(0, 0.5),
        lambda a, b: a * b + 1,
        lambda a, b: a.gate(b, at_least=0.5, otherwise=-1.0),
        lambda a, b: b.gate(a + b, at_least=0.5, otherwise=3.0) - a,
    ],
)
def test_a_value_from_components_is_the_score(change: Any) -> None:
    reward = change(binary("a"), binary("b"))
    talks = [
        [{"role": "user", "content": "", "a": a, "b": b}]
        for a, b in [(0.0, 1.0), (1.0, 0.25), (0.25, 0.75), (None, 1.0), (1.0, None)]
    ]
    scores = reward.score(talks)
    for row, value in enumerate(scores.values):
        components = {name: column[row] for name, column in scores.components.items()}
        assert reward.value_from_leaf_scores(components) == value


def test_the_terms_of_a_configuration_have_the_names_of_its_components() -> None:
    specs = [
        {"kind": "length", "high": 4, "weight": 0.5, "name": "short"},
        {"kind": "repetition"},
    ]
    reward = build(specs)
    assert [term.name for term in reward.terms()] == ["short", "repetition"]
    assert [leaf.name for leaf in reward.leaves()] == ["short", "repetition"]
