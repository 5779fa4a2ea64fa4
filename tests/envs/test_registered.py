"""Requirements of every registered environment in every variant."""

import random
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlhf import envs

VARIANTS = [(f"text/{name}", {}) for name in envs.TASKS] + [
    ("text/Bandit-v0", {"arms": 2, "horizon": 4}),
    ("text/Echo-v0", {"num_words": 4}),
    ("text/FrozenLake-v0", {"slippery": False, "max_turns": 20}),
    ("text/GuessNumber-v0", {"numbers": 7, "guesses": 2}),
    ("text/KeyDoor-v0", {"size": 3, "step_cost": 0.0}),
    ("text/KnowledgeGraph-v0", {"hops": 2}),
    ("text/KuhnPoker-v0", {"opponent": "random", "seat": "second"}),
    ("text/PreferenceBandit-v0", {"reward": "proxy", "instructions": False}),
    ("text/ProgramSynthesis-v0", {"length": 1, "turns": 2}),
    ("text/Prompts-v0", {"prompts": ["a", "b"], "system_prompt": "s"}),
    ("text/Recommend-v0", {"sessions": 3}),
    ("text/Support-v0", {"cost_limit": 0.2, "turns": 2}),
    ("text/TMaze-v0", {"length": 1, "steps": 3}),
    ("text/TicTacToe-v0", {"seat": "second"}),
    ("text/TicTacToe-v0", {"opponent": "optimal", "seat": "first"}),
    ("text/ToolLookup-v0", {"hops": 1, "people": 3}),
    ("text/Triage-v0", {"test_cost": 0.1}),
    ("text/Wordle-v0", {"words": 30, "guesses": 2}),
]
NAMES = [f"{env_id}{kwargs or ''}" for env_id, kwargs in VARIANTS]
every_variant = pytest.mark.parametrize(("env_id", "kwargs"), VARIANTS, ids=NAMES)


def transcript(env: gym.Env, seed: int, actions: np.random.Generator) -> list:
    """The results of all calls in an episode under the random policy."""
    record = [env.reset(seed=seed)]
    for _ in range(200):
        action = env.unwrapped.sample_action(actions)
        record.append((action, env.step(action)))
        if record[-1][1][2] or record[-1][1][3]:
            return record
    raise AssertionError("the episode does not end")


@every_variant
def test_gymnasium_checker_is_silent(env_id, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(env_id, **kwargs).unwrapped)


@every_variant
def test_spec_json_round_trip(env_id, kwargs):
    spec = gym.make(env_id, **kwargs).spec
    assert spec is not None
    text = spec.to_json()
    assert gym.envs.registration.EnvSpec.from_json(text).kwargs.keys() >= kwargs.keys()


@every_variant
def test_one_seed_is_one_episode_and_copies_do_not_interfere(env_id, kwargs):
    first, second = gym.make(env_id, **kwargs), gym.make(env_id, **kwargs)
    alone = {s: transcript(first, s, np.random.default_rng(s)) for s in (0, 1, 2**30)}
    for seed, expected in alone.items():
        assert repr(transcript(second, seed, np.random.default_rng(seed))) == repr(expected)
    left, right = [first.reset(seed=0)], [second.reset(seed=1)]
    for step in range(max(len(alone[0]), len(alone[1])) - 1):
        for env, record, reference in ((first, left, alone[0]), (second, right, alone[1])):
            if step + 1 < len(reference):
                action = reference[step + 1][0]
                record.append((action, env.step(action)))
    assert repr(left) == repr(alone[0])
    assert repr(right) == repr(alone[1])


@every_variant
def test_global_generators_are_unchanged(env_id, kwargs):
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), repr(np.random.get_state())
    env = gym.make(env_id, **kwargs)
    transcript(env, 0, np.random.default_rng(0))
    env.reset()
    assert random.getstate() == before[0]
    assert repr(np.random.get_state()) == before[1]


@every_variant
def test_different_seeds_give_different_episodes(env_id, kwargs):
    env = gym.make(env_id, **kwargs)
    episodes = {repr(transcript(env, seed, np.random.default_rng(seed))) for seed in range(20)}
    assert len(episodes) > 1


@every_variant
def test_make_vec_rows_equal_single_environments(env_id, kwargs):
    many = gym.make_vec(env_id, num_envs=3, **kwargs)
    texts, _ = many.reset(seed=[4, 4, 9])
    env = gym.make(env_id, **kwargs)
    assert list(texts) == [env.reset(seed=seed)[0] for seed in (4, 4, 9)]
    actions = many.action_space.sample()
    texts, rewards, terminated, _, _ = many.step(actions)
    for row, seed in enumerate((4, 4, 9)):
        env.reset(seed=seed)
        text, reward, ended, _, _ = env.step(actions[row])
        assert (text, reward, ended) == (texts[row], rewards[row], terminated[row])


@every_variant
def test_every_info_has_keys_of_fixed_types(env_id, kwargs):
    env = gym.make(env_id, **kwargs)
    types = {"is_success": bool, "valid": bool, "cost": float, "reason": str}
    for seed in range(10):
        record = transcript(env, seed, np.random.default_rng(seed))
        infos = [record[0][1], *(step[4] for _, step in record[1:])]
        for info in infos:
            assert {"valid", "cost", "reason"} <= info.keys()
            for key, value in info.items():
                assert type(value) is types.setdefault(key, type(value)), key


@every_variant
def test_episodes_end_by_themselves_within_max_turns(env_id, kwargs):
    env = gym.make(env_id, **kwargs).unwrapped
    for seed in range(20):
        record = transcript(env, seed, np.random.default_rng(seed))
        assert len(record) - 1 <= env.max_turns
        assert record[-1][1][2]
        assert not record[-1][1][3]


@every_variant
def test_malformed_actions_never_succeed_or_extend_an_episode(env_id, kwargs):
    env = gym.make(env_id, **kwargs).unwrapped
    env.reset(seed=0)
    for _ in range(env.max_turns):
        _, reward, terminated, _, info = env.step("\x00 no such thing 😀")
        assert not info.get("is_success", False)
        assert np.isfinite(reward)
        if terminated:
            return
    raise AssertionError("invalid actions must use up the turn budget")


@every_variant
def test_values_are_ordered(env_id, kwargs):
    if env_id == "text/Prompts-v0":
        pytest.skip("a list of prompts has no ground truth of its own")
    env = gym.make(env_id, **kwargs).unwrapped
    low, high = env.random_value(), env.optimal_value()
    assert low < high
    spec = gym.spec(env_id)
    if not kwargs:
        assert spec.reward_threshold is not None
        assert low < spec.reward_threshold <= high
