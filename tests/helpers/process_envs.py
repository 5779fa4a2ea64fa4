"""An environment whose actions break it in several ways; importing the module registers it."""

import os
import time
from typing import Any

import gymnasium as gym

from rlhf.envs.core import FreeText


class Faulty(gym.Env):
    """Ends its process, raises, returns what cannot be pickled, or hangs, as the action says."""

    observation_space = FreeText()
    action_space: Any = FreeText()

    def reset(self, *, seed=None, options=None):
        return "start", {}

    def step(self, action):
        if "end" in action:
            os._exit(7)
        if "raise" in action:
            raise ValueError("broken")
        if "hang" in action:
            time.sleep(3600)
        return "over", 1.0, True, False, {"f": lambda: 1} if "unpicklable" in action else {}


gym.register("Faulty-v0", Faulty)
