"""Replies as actions, and environments made from a configuration."""

import gymnasium as gym
import pytest

from rlhf.config.rollout import EnvSpec
from rlhf.errors import UserError
from rlhf.rollout.actions import text_to_action
from rlhf.rollout.environments.calls import make_env_factory
from tests.helpers.rollouts import FakeEngine, Tales, collect_one, episode_seeds, make_collector


class Buttons(Tales):
    """Actions are 2, 3 and 4; 4 ends it."""

    action_space = gym.spaces.Discrete(3, start=2)

    def step(self, action):
        assert self.action_space.contains(action)
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, int(action) == 4, truncated, info


@pytest.fixture(autouse=True)
def _no_environments():
    Tales.made.clear()


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("3", 3),
        ("I press 4.", 4),
        ("2 or 3", 2),
        ("5", None),
        ("0", None),
        ("-3", None),
        ("press", None),
        ("", None),
        ("-", None),
        ("²", None),  # a digit to str.isdigit, not a number to int
        ("9" * 5000, None),
    ],
)
def test_the_first_number_is_the_action_if_it_is_legal(text, action):
    assert text_to_action(text, Buttons()) == action


def test_invalid_action_ends_episode():
    engine = FakeEngine("3", "nonsense")
    rollout = collect_one(engine, Buttons, invalid_reward=-2.0)
    assert (rollout.terminated, rollout.invalid, rollout.num_turns) == (True, 1, 2)
    assert rollout.env_return == 1.0 - 2.0
    assert Tales.made[0].actions == [3]  # the environment was not asked, and nothing stood in


def test_invalid_action_can_be_retried():
    engine = FakeEngine("nonsense", "7", "4")
    rollout = collect_one(engine, Buttons, invalid="retry", invalid_reward=-0.25)
    assert (rollout.terminated, rollout.invalid, rollout.num_turns) == (True, 2, 3)
    assert Tales.made[0].actions == [4]
    assert "number from 2 to 4" in rollout.conversation[2]["content"]
    assert rollout.env_return == 1.0 - 0.5


def test_endless_retries_are_truncated_by_budget():
    engine = FakeEngine("nonsense")
    rollout = collect_one(engine, Buttons, invalid="retry", max_tokens=120)
    assert rollout.truncated
    assert rollout.invalid == rollout.num_turns > 1


def test_other_action_spaces_are_refused():
    class Steering(Tales):
        action_space = gym.spaces.Box(-1, 1)

    engine = FakeEngine("3")
    with pytest.raises(UserError, match="only text and discrete actions"):
        collect_one(engine, Steering)


def test_environments_are_made_by_id():
    engine = FakeEngine("0", "1", "9")
    rollout = collect_one(
        engine, make_env_factory(EnvSpec(id="FrozenLake-v1", kwargs={"is_slippery": False}))
    )
    assert rollout.conversation[0]["content"] == "0"
    assert (rollout.num_turns, rollout.invalid) == (3, 1)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (EnvSpec(id="text/NoSuchTask-v0"), "NoSuchTask"),
        (EnvSpec(id="FrozenLake-v1", kwargs={"colour": 1}), "cannot be made"),
    ],
)
def test_environment_that_cannot_be_made_is_user_error(spec, words):
    with pytest.raises(UserError, match=words) as error:
        make_env_factory(spec)()
    assert "\n" not in str(error.value)


def test_prompts_are_an_environment():
    engine = FakeEngine("fine")
    prompts = [
        "How are you?",
        [{"role": "system", "content": "S"}, {"role": "user", "content": "And you?"}],
    ]
    spec = EnvSpec(prompts=[object()])  # type: ignore[list-item]
    played = make_collector(engine, make_env_factory(spec, prompts)).collect(episode_seeds(0, 1))
    asked = {tuple(m["content"] for m in r.conversation) for r in played}
    assert asked == {("How are you?", "fine"), ("S", "And you?", "fine")}
    assert all(r.terminated for r in played)
