"""Convert model replies into environment actions."""

from __future__ import annotations

import re

import gymnasium as gym
import numpy as np

from rlhf.errors import UserError


def text_to_action(text: str, env: gym.Env) -> str | np.int64 | None:
    """Convert a reply to an action.

    For a text action space, the action is the reply. For a discrete action space, it is the first
    integer in the reply. The result is None if the reply contains no integer, or if the first
    integer is outside the space.

    Raises:
        UserError: The action space is neither text nor discrete.
    """
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
        number = re.search(r"-?[0-9]+", text)
        if number is None:
            return None
        value = int(number[0][:18])  # enough digits for any action space
        return np.int64(value) if space.start <= value < space.start + space.n else None
    if isinstance(space, gym.spaces.Text) or "Text" in type(space).__name__:
        return text
    raise UserError(
        f"{env} has the action space {space}; only text and discrete actions are supported"
    )
