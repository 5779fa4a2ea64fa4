"""An environment: find a hidden digit."""

import gymnasium as gym

from rlhf.envs.core import FreeText
from rlhf.plugins import register_environment

plugin_api = 1


@register_environment("mine/HotOrCold-v0")
class HotOrCold(gym.Env):
    """Guess a hidden digit; the answer says whether the guess is close."""

    max_turns = 4

    def __init__(self):
        self.observation_space, self.action_space = FreeText(), FreeText()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.digit, self.turn = int(self.np_random.integers(10)), 0
        return "Guess a digit.", {}

    def step(self, action):
        self.turn, guess = self.turn + 1, action.strip()
        is_digit = len(guess) == 1 and guess in "0123456789"
        right = guess == str(self.digit)
        hot = is_digit and abs(int(guess) - self.digit) <= 2
        return "Hot." if hot else "Cold.", float(right), right, self.turn == self.max_turns, {}
