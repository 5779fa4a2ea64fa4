"""Exact solutions of small tasks whose value is known by hand: one guess of a number, 0 to 3."""

import random

import gymnasium as gym
import numpy as np
import pytest

from rlhf.envs.core import TextEnv
from rlhf.envs.exact import NotEnumerableError, exact_value


class Guess(TextEnv):
    """`hide` stores the number and returns the observation; the number is uniform."""

    def start(self):
        return self.hide(int(self.np_random.integers(4)))

    def hide(self, number):
        self.number = number
        return "?"

    def found(self):
        return self.number

    def step(self, action):
        self.turns_left -= 1
        return self.turn("", float(action == str(self.found())), True)

    def legal_actions(self):
        return ["0", "1", "2", "3"]


class InLargeArray(Guess):
    """numpy abbreviates the text of an array of more than 1,000 numbers."""

    def hide(self, number):
        self.board = np.zeros(3000)
        self.board[1500] = number
        return "?"

    def found(self):
        return int(self.board[1500])


class InLateDigits(InLargeArray):
    """numpy shows eight digits of a number."""

    def hide(self, number):
        self.number = np.array([1 + number * 1e-10])
        return "?"

    def found(self):
        return round((self.number[0] - 1) * 1e10)


class InObject(Guess):
    """An object whose text does not show its content."""

    class Box:
        def __init__(self, number):
            self.number = number

        def __repr__(self):
            return "Box"

    def hide(self, number):
        self.box = self.Box(number)
        return "?"

    def found(self):
        return self.box.number


@pytest.mark.parametrize("kind", [Guess, InLargeArray, InLateDigits, InObject])
def test_a_hidden_number_is_found_in_a_quarter_of_the_episodes(kind):
    """Wherever an environment stores the number, and if `start` is the first to do so."""
    assert exact_value(kind()) == pytest.approx(0.25)


@pytest.mark.parametrize("kind", [Guess, InLargeArray])
def test_a_shown_number_is_found_always(kind):
    class Shown(kind):
        def hide(self, number):
            super().hide(number)
            return f"It is {number}."

    assert exact_value(Shown()) == pytest.approx(1.0)


def draws(*starts):
    return pytest.mark.parametrize("start", starts)


@draws(
    lambda env, seed: env.hide(random.Random(seed).randrange(4)),  # 0.25
    lambda env, seed: env.hide(int(np.random.default_rng(seed).integers(4))),  # 0.25
    lambda env, seed: env.hide((seed or 0) % 4),  # 0.25 over seeds
    lambda env, seed: env.hide(env.generator.randrange(4)),
    lambda env, seed: env.hide(0) + f" {env.np_random.random()}",  # an observation of the draw
    lambda env, seed: env.hide(0) + f" {[env.np_random.random()]}",
    lambda env, seed: env.hide(0) + f" {env.np_random.random():.2f}",
    lambda env, seed: env.hide(int(4 * env.np_random.random() ** 2)),
    lambda env, seed: env.hide(round(3 * env.np_random.random())),
    lambda env, seed: env.hide(int(np.sqrt(16 * env.np_random.random(2))[0])),
    lambda env, seed: env.hide(int(env.np_random.integers([4, 4])[0])),
    lambda env, seed: env.hide(int(env.np_random.choice(4, size=(2, 2))[0, 0])),
    lambda env, seed: env.hide(int(env.np_random.choice([0, 1, 2, 3], axis=0))),
)
def test_draws_that_cannot_be_enumerated_are_refused(start):
    class Drawn(Guess):
        def __init__(self):
            super().__init__()
            self.generator = random.Random(0)

        def reset(self, *, seed=None, options=None):
            gym.Env.reset(self, seed=seed)
            self.turns_left = 1
            return start(self, seed), {}

    with pytest.raises(NotEnumerableError):
        exact_value(Drawn())
