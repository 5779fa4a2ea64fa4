"""The TextWorld adapter; skipped without the extra."""

import random
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlhf import envs  # noqa: F401 (registers the ids)

pytest.importorskip("textworld")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of compiled games for all tests."""
    return str(tmp_path_factory.mktemp("games"))


def make(folder: str, **kwargs):
    return gym.make("text/TextWorld-v0", folder=folder, games=2, **kwargs).unwrapped


def test_the_walkthrough_earns_the_whole_score_and_junk_nothing(folder):
    env = make(folder)
    for seed in (0, 1):
        text, info = env.reset(seed=seed)
        assert info["game"] == seed
        assert text.strip()
        for junk in ("", "😀", "x" * 5000, "quit", "restart"):
            _, reward, done, _, info = env.step(junk)
            assert (reward, done, info["valid"]) == (0.0, False, False)
        total, done = 0.0, False
        while not done:
            action = env.expert()
            assert action in env.legal_actions()
            _, reward, done, _, info = env.step(action)
            total += reward
        assert total == env.optimal_value() == 1.0
        assert info["is_success"]
    env.close()


def test_copies_do_not_interfere_and_the_global_generators_stay(folder):
    state = random.getstate(), repr(np.random.get_state())
    first, second = make(folder), make(folder)

    def episode(env, seed):
        rng, record = np.random.default_rng(seed), [env.reset(seed=seed)]
        for _ in range(8):
            action = env.sample_action(rng)
            record.append((action, env.step(action)))
            yield repr(record)
            if record[-1][1][2]:
                return

    alone = list(episode(first, 0))
    other = episode(second, 1)
    assert [(record, next(other, None))[0] for record in episode(first, 0)] == alone
    assert (random.getstate(), repr(np.random.get_state())) == state
    first.close()
    second.close()


def test_gymnasium_checker_is_silent(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(folder), skip_render_check=True, skip_close_check=True)


def test_splits_have_different_games(folder):
    assert make(folder, split="test").reset(seed=1)[1]["game"] == 10**6 + 1
