"""Train in a custom gymnasium environment with text observations and actions.

    python examples/custom_environment.py

The model has random weights so that the example runs in seconds on a CPU.
"""

from typing import Any

import gymnasium as gym

import rlhf
from rlhf.envs.check import check
from rlhf.envs.core import FreeText
from rlhf.plugins import register_environment


@register_environment("mine/HotOrCold-v0")
class HotOrCold(gym.Env):
    """The policy must find a hidden digit within four turns.

    The reward is 1 for the correct digit, 0.1 for a wrong digit, and 0 for any other text.
    Observations and actions are text. ``reset`` draws all random values from ``self.np_random``, so
    that an episode depends only on its seed and the actions.
    """

    max_turns = 4

    def __init__(self) -> None:
        # As class attributes, the spaces would share one random generator among all instances.
        self.observation_space, self.action_space = FreeText(), FreeText()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Draw a new digit and return the first observation."""
        super().reset(seed=seed)
        self.digit, self.turn = int(self.np_random.integers(10)), 0
        return "Guess a digit.", {}

    def step(self, action: str):
        """Compare the guess with the digit; return observation, reward and end of the episode."""
        self.turn += 1
        guess = action.strip()
        right = guess == str(self.digit)
        is_digit = len(guess) == 1 and guess in "0123456789"
        if right:
            observation = "Right."
        elif is_digit:
            observation = "Hot." if abs(int(guess) - self.digit) <= 2 else "Cold."
        else:
            observation = "That is not a digit."
        # The task ends when the digit is found (terminated). The turn limit only stops the
        # episode (truncated), so that the return is bootstrapped from the value of the next state.
        truncated = not right and self.turn == self.max_turns
        return observation, 1.0 if right else 0.1 * is_digit, right, truncated, {}


def main() -> None:
    """Check the environment, then train in it."""
    for finding in check("mine/HotOrCold-v0", episodes=3):
        print("check:", finding)
    rlhf.stage(
        "ppo",
        {
            "output_dir": "runs/custom_environment",
            "model": {"scratch": {"hidden_size": 32, "num_layers": 2, "context": 128}},
            "env": {"id": "mine/HotOrCold-v0"},
            "rollout": {"max_new_tokens": 1},
            "episodes_per_step": 32,
            "num_steps": 5,
            "optimizer": {"learning_rate": 3e-3},
        },
    )
    print("report: runs/custom_environment/report.html")


if __name__ == "__main__":
    main()
