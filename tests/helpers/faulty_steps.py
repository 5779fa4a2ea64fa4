"""Steps of an environment that fail in different ways, and the messages of their failures."""

import os
import sys
import time
from typing import Any

from tests.helpers.rollouts import Tales


def tale_with(step: Any) -> type[Tales]:
    """An environment whose step is this function."""

    class Faulty(Tales):
        def step(self, action):
            return step(self, action)

    return Faulty


def hang(env: Any, action: str) -> Any:
    """Wait, and catch everything that interrupts the first time."""
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)


GOOD = ("", 1.0, True, False, {})
STEPS = {
    "raise": (lambda env, action: 1 / 0, "ZeroDivisionError: division by zero"),
    "exit": (lambda env, action: sys.exit(0), r"RuntimeError: called sys.exit\(0\)"),
    "end of the process": (
        lambda env, action: os._exit(0),
        r"RuntimeError: called sys.exit\(0\)",
    ),
    "hang": (hang, "TimeoutError: took longer than 0.05 s"),
    "nan": (lambda env, action: ("", float("nan"), *GOOD[2:]), "ValueError: the reward is nan"),
    "infinite": (lambda env, action: ("", float("inf"), *GOOD[2:]), "the reward is inf"),
    "cost": (lambda env, action: (*GOOD[:4], {"cost": float("nan")}), r'info\["cost"\] is nan'),
    "success": (lambda env, action: (*GOOD[:4], {"is_success": "no"}), "is_success.*type str"),
    "valid": (lambda env, action: (*GOOD[:4], {"valid": float("nan")}), r'info\["valid"\] is nan'),
    "partial success": (
        lambda env, action: (*GOOD[:4], {"is_success": 0.5}),
        r'info\["is_success"\] is 0.5, not true or false',
    ),
    "success nan": (
        lambda env, action: (*GOOD[:4], {"is_success": float("nan")}),
        r'info\["is_success"\] is nan',
    ),
    "partly valid": (
        lambda env, action: (*GOOD[:4], {"valid": 0.5}),
        r'info\["valid"\] is 0.5, not true or false',
    ),
    "surrogate": (lambda env, action: ("\ud800", *GOOD[1:]), "half of a surrogate pair"),
    "reward text": (lambda env, action: ("", "1", *GOOD[2:]), "the reward is of type str"),
    "no observation": (lambda env, action: (None, *GOOD[1:]), "observation is of type NoneType"),
    "terminated": (lambda env, action: ("", 1.0, "no", False, {}), "terminated is of type str"),
    "info": (lambda env, action: (*GOOD[:4], None), "info is of type NoneType"),
    "four values": (
        lambda env, action: ("", 1.0, True, {}),
        "ValueError: step returned 4 values; return observation",
    ),
}
