"""The TextArena adapter; skipped without the extra."""

import random
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlhf.envs.adapters.textarena import GAMES, NOT_OFFERED, TextArena, games

pytest.importorskip("textarena")

SLOW_TO_DEAL = {"Sokoban", "Set"}


def make(game: str, **kwargs) -> TextArena:
    return gym.make("text/TextArena-v0", game=game, max_turns=8, **kwargs).unwrapped


def episode(env: TextArena, seed: int):
    """Play an episode of sampled moves and yield the result of each."""
    rng, record = np.random.default_rng(seed), [env.reset(seed=seed)]
    yield record
    done = False
    while not done:
        action = env.sample_action(rng)
        step = env.step(action)
        record.append((action, step))
        yield record
        done = step[2]


def last(iterator):
    *_, final = iterator
    return final


def test_at_least_fifty_five_games_are_available():
    assert len(games()) >= 55
    assert not set(GAMES) & set(NOT_OFFERED)


@pytest.mark.slow
@pytest.mark.parametrize("game", sorted(set(GAMES) - SLOW_TO_DEAL))
def test_every_game_repeats_does_not_interfere_and_leaves_global_generators_alone(game):
    state = random.getstate(), repr(np.random.get_state())
    first, second = make(game), make(game)
    alone = repr(last(episode(first, 1)))
    other = episode(second, 2)
    mixed = [(repr(record), next(other, None))[0] for record in episode(first, 1)]
    assert mixed[-1] == alone
    assert (random.getstate(), repr(np.random.get_state())) == state
    for junk in ("", "😀", "[", "a" * 500):
        first.reset(seed=0)
        _, reward, _, truncated, info = first.step(junk)
        assert np.isfinite(reward)
        assert not truncated
        assert not info["is_success"]


@pytest.mark.parametrize("game", ["TicTacToe", "GuessTheNumber", "Blackjack", "ThreePlayerIPD"])
def test_gymnasium_checker_is_silent(game):
    env = make(game)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)


def test_a_function_may_be_the_opponent_and_sees_its_own_side():
    seen = []

    def lowest(conversation):
        seen.append(conversation)
        free = conversation[-1]["content"].rsplit("Available Moves:", 1)[1]
        return f"[{min(c for c in free if c.isdigit())}]"

    env = make("TicTacToe", opponent=lowest)
    for seed in range(4):
        env.reset(seed=seed)
        done, reward = False, 0.0
        while not done:
            free = env._text.rsplit("Available Moves:", 1)[1]
            move = max(c for c in free if c.isdigit())
            _, reward, done, _, info = env.step(f"[{move}]")
            assert info["valid"]
        assert reward in (-1.0, 0.0, 1.0)
    assert seen[0][0]["role"] == "system"
    assert {message["role"] for message in seen[-1][1:]} == {"user", "assistant"}


def test_an_invalid_move_is_reported():
    env = make("TicTacToe")
    env.reset(seed=0)
    assert env.step("hello")[4]["valid"] is False
    _, reward, done, _, info = env.step("hello")
    assert (reward, done, info["valid"]) == (-1.0, True, False)


def test_error_messages_in_place_of_rewards_pay_nothing():
    env = make("Countdown")
    env.reset(seed=0)
    _, reward, done, _, _ = env.step("hello")
    while not done:
        _, reward, done, _, _ = env.step("hello")
    assert reward == 0.0


@pytest.mark.parametrize("breaks", ["step", "get_observation"])
def test_game_that_raises_counts_as_a_loss(breaks, monkeypatch):
    def fail(*_):
        raise IndexError("odd move")

    env = make("TicTacToe")
    env.reset(seed=0)
    monkeypatch.setattr(env._game, breaks, fail)
    _, reward, done, _, info = env.step("[4]")
    assert (reward, done, info["is_success"], info["valid"]) == (-1.0, True, False, False)
    assert info["reason"] == "the game raised IndexError"


def test_multiplayer_game_without_a_reward_counts_as_a_loss(monkeypatch):
    env = make("TicTacToe")
    env.reset(seed=0)
    monkeypatch.setattr(env._game, "step", lambda action: (True, {}))
    monkeypatch.setattr(env._game, "close", lambda: ({env._seat: "an error"}, {}))
    assert env.step("[4]")[1] == -1.0


def test_games_that_are_unknown_or_not_offered_are_refused():
    with pytest.raises(ValueError, match="did you mean 'TicTacToe'"):
        make("TicTacTo")
    with pytest.raises(ValueError, match="Wordle is not offered: it downloads"):
        make("Wordle")
    with pytest.raises(ValueError, match="not registered"):
        make("Nim-v0-gigantic")
    with pytest.raises(ValueError, match="opponent must be"):
        make("Nim", opponent="optimal")
