"""The text space, the base class, the vector environment, and the two simplest tasks."""

import copy
import pickle
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv

from rlhf import envs
from rlhf.envs.core import FreeText
from rlhf.envs.echo import Echo
from rlhf.envs.prompts import PromptEnv
from rlhf.envs.vector import TextVectorEnv, batch_infos


def test_free_text_admits_any_unicode_and_checks_only_length():
    space = FreeText(5)
    assert all(text in space for text in ["", "é→😀", "\x00\ud800", "abcde"])
    assert all(value not in space for value in ["abcdef", b"a", None, 3])
    assert FreeText(5) == space != FreeText(6)
    assert space != gym.spaces.Text(5)


def test_free_text_sampling_is_seeded_and_uses_the_sampler():
    plain = [FreeText(9, seed=3).sample() for _ in range(2)]
    assert plain[0] == plain[1]
    assert plain[0] in FreeText(9)
    assert FreeText(sampler=lambda rng: "legal").sample() == "legal"


def test_free_text_copies_share_the_sampler_and_pickles_omit_it():
    env = Echo()
    twin = copy.deepcopy(env.action_space)
    assert twin.sample() in env.words
    small = pickle.dumps(env.action_space)
    assert len(small) < 2000
    assert pickle.loads(small) == env.action_space


def test_async_vector_env_with_shared_memory_rejects_text():
    with pytest.raises(ValueError, match="shared_memory=False"):
        AsyncVectorEnv([Echo, Echo], shared_memory=True)


def test_async_vector_env_without_shared_memory_returns_right_observations():
    many = gym.make_vec(
        "text/Echo-v0", 2, vectorization_mode="async", vector_kwargs={"shared_memory": False}
    )
    try:
        texts, _ = many.reset(seed=[5, 6])
    finally:
        many.close()
    alone = [gym.make("text/Echo-v0").reset(seed=seed)[0] for seed in (5, 6)]
    assert list(texts) == alone


def test_make_vec_takes_equal_seeds_and_skips_finished_rows():
    many = gym.make_vec("text/Bandit-v0", num_envs=3, horizon=3)
    assert isinstance(many, TextVectorEnv)
    texts, _ = many.reset(seed=[7, 7, 8])
    assert texts[0] == texts[1]
    for _ in range(3):
        _, rewards, terminated, _, infos = many.step([None, *many.action_space.sample()[1:]])
        assert rewards[0] == 0.0
        assert infos["_valid"].tolist() == [False, True, True]
    assert terminated.tolist() == [False, True, True]
    texts, _, terminated, _, _ = many.step([many.envs[0].action_space.sample(), None, None])
    assert texts[1:] == ("", "")
    assert terminated.tolist() == [False, True, True]
    with pytest.raises(ValueError, match="row 1 is finished"):
        many.step([None, "x", None])
    with pytest.raises(ValueError, match="3 actions"):
        many.step(["x"])
    many.reset(seed=[1, 2, 3], options={"reset_mask": np.array([False, True, False])})
    _, _, terminated, _, _ = many.step([None, "x", None])
    assert terminated.tolist() == [False, False, True]


def test_vector_rows_sample_their_own_legal_actions():
    many = gym.make_vec("text/Bandit-v0", num_envs=2)
    many.reset(seed=[0, 1])
    for _ in range(20):
        for action, env in zip(many.action_space.sample(), many.envs, strict=True):
            assert action in env.unwrapped.legal_actions()


def test_make_vec_passes_keyword_arguments_and_time_limits():
    many = gym.make_vec("text/Bandit-v0", num_envs=2, horizon=9, max_episode_steps=2)
    many.reset(seed=0)
    many.step(["arm 1", "arm 1"])
    _, _, terminated, truncated, _ = many.step(["arm 1", "arm 1"])
    assert (terminated.tolist(), truncated.tolist()) == ([False, False], [True, True])


def test_importing_envs_stays_light():
    heavy = "{'torch', 'transformers', 'rlhf.reward_models'}"
    code = f"import rlhf.envs, sys; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_prompt_env_visits_every_prompt_once_in_consecutive_seeds():
    prompts = [f"prompt {i}" for i in range(7)]
    env = PromptEnv(prompts)
    for start in (0, 2**30, 2**31 - 7):
        indices = [env.reset(seed=start + i)[1]["prompt_index"] for i in range(7)]
        assert sorted(indices) == list(range(7))
    assert indices != list(range(7))
    text, info = env.reset(seed=3)
    assert text == prompts[info["prompt_index"]]


def test_prompt_env_scores_the_whole_conversation():
    seen = []

    def reward(conversations):
        seen.extend(conversations)
        return [0.25]

    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    env = PromptEnv([history], reward=reward, system_prompt="Be brief.")
    text, info = env.reset(seed=0)
    assert text == "bye"
    assert info["messages"] == history[:2]
    _, score, terminated, truncated, info = env.step("ciao")
    assert (score, terminated, truncated, info["scored"]) == (0.25, True, False, True)
    system, answer = (
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "ciao"},
    )
    assert seen == [[system, *history, answer]]


def test_prompt_env_reports_unscored_replies():
    env = PromptEnv(["hi"], reward=lambda conversations: [None])
    env.reset(seed=0)
    _, score, _, _, info = env.step("ciao")
    assert (score, info["scored"]) == (0.0, False)


@pytest.mark.parametrize("prompts", [[], "hello", [[]], [[{"role": "assistant", "content": "x"}]]])
def test_prompt_env_rejects_invalid_prompts(prompts):
    with pytest.raises(ValueError, match="prompts"):
        PromptEnv(prompts)


def test_every_registered_id_has_a_vector_entry_point():
    for name in envs.TASKS:
        assert gym.spec(f"text/{name}").vector_entry_point == f"rlhf.envs.vector:text/{name}"


def test_only_ids_are_vector_entry_points():
    from rlhf.envs import vector

    with pytest.raises(AttributeError):
        _ = vector.nothing


def test_vector_infos_keep_every_rows_value():
    infos = [{"a": 1, "b": "x"}, {"a": 0.5}, {}, {"a": True, "c": {"d": 2}}]
    batch = batch_infos(infos)
    assert batch["a"].tolist() == [1.0, 0.5, 0.0, 1.0]
    assert batch["_a"].tolist() == [True, True, False, True]
    assert batch["b"].tolist() == ["x", None, None, None]
    assert batch["c"]["d"].tolist() == [0, 0, 0, 2]
    assert batch["_c"].tolist() == [False, False, False, True]


def test_vector_infos_have_gymnasiums_form():
    ours = gym.make_vec("text/Support-v0", num_envs=2)
    theirs = gym.make_vec("text/Support-v0", num_envs=2, vectorization_mode="sync")
    results = []
    for many in (ours, theirs):
        many.reset(seed=[1, 2])
        results.append(many.step(("verify", "hm"))[4])
    assert results[0].keys() == results[1].keys()
    for key in results[0]:
        assert results[0][key].tolist() == results[1][key].tolist()
        assert results[0][key].dtype == results[1][key].dtype
