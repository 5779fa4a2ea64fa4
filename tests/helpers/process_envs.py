"""An environment whose actions break it in several ways; importing the module registers it."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import gymnasium as gym

from rlhf.envs.core import FreeText


class Faulty(gym.Env):
    """Ends its process, raises, returns what cannot be pickled, or hangs, as the action says.

    It has no observation space, which no collector reads.
    """

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
        if "pid" in action:
            return str(os.getpid()), 1.0, False, False, {}
        if "child" in action:
            program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            program.terminate()
            return str(program.wait(60)), 1.0, False, False, {}
        return "over", 1.0, True, False, {"f": lambda: 1} if "unpicklable" in action else {}


gym.register("Faulty-v0", Faulty)


class Refused(Faulty):
    """Cannot be made: its process ends, it cannot be pickled, or it does not return."""

    def __init__(self, kind: str) -> None:
        if kind == "end":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as native code does
            time.sleep(3600)
        self.action_space = FreeText()
        self.action_space.unpicklable = lambda: 1


gym.register("Refused-v0", Refused)


class NoTextActions(Faulty):
    """Has actions that are neither text nor numbers."""

    action_space: Any = gym.spaces.Box(0.0, 1.0)


gym.register("NoTextActions-v0", NoTextActions)
