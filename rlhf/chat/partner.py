"""Partners of a model in a chat: a user, or an environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import gymnasium as gym

from rlhf.rollout.collector import Collector
from rlhf.rollout.environments.calls import EnvironmentCaller, reset_environment
from rlhf.rollout.turns import StepResult, step_with_reply


class Partner(Protocol):
    """Source of the messages to which a model replies."""

    env: gym.Env
    """Environment. Its system message, if it has one, begins the conversation."""

    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start a conversation; return the first message, and the info of the start state."""
        ...

    def answer(self, reply: str) -> StepResult | None:
        """Return the result of a reply with the next message; None if there is none yet."""
        ...

    def close(self) -> None:
        """Release the resources of the partner."""
        ...


class UserPartner:
    """A user, whose messages are appended to a list.

    Args:
        messages: Messages of the user. Other code appends to the list, or removes its last items.
    """

    def __init__(self, messages: Sequence[str]) -> None:
        self.env: gym.Env = gym.Env()  # without a system message
        self._messages, self._read = messages, 0

    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Return the first message of the user."""
        self._read = 1
        return self._messages[0], {}

    def answer(self, reply: str) -> StepResult | None:
        """Return the next message of the user, or None if there is none yet."""
        if self._read >= len(self._messages):
            return None
        self._read += 1
        return self._messages[self._read - 1], 0.0, False, False, {}

    def close(self) -> None:
        """Do nothing."""


class EnvironmentPartner:
    """An environment that belongs to one model.

    Args:
        collector: Collector of the model, which makes the environment and converts replies to
            actions.
        timeout: Time limit of a call of the environment, in seconds; None means no limit.
    """

    def __init__(self, collector: Collector, timeout: float | None) -> None:
        self._collector = collector
        self._caller = EnvironmentCaller(timeout=timeout, can_drop=False)
        self.env = collector.make_env()
        self._seed = 0

    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Reset the environment; return the first observation and the info.

        Raises:
            UserError: The environment failed.
        """
        self._seed = seed
        start = self._caller.run(seed, lambda: reset_environment(self.env, seed))
        assert start is not None  # failures raise
        return start

    def answer(self, reply: str) -> StepResult | None:
        """Step the environment with the action in a reply, and return the result.

        Raises:
            UserError: The environment failed.
        """
        return self._caller.run(
            self._seed, lambda: step_with_reply(self.env, reply, self._collector.spec)
        )

    def close(self) -> None:
        """Close the environment."""
        self._caller.close(self.env)
