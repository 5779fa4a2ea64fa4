"""A task with many turns of fixed lengths, which do not depend on the replies."""

from __future__ import annotations

import random
from typing import Any

import gymnasium as gym

from benchmarks.texts import words
from rlhf.envs.core import Step, TextEnv

ENV_ID = "benchmarks.multi_turn_env:benchmarks/Interview-v0"


class Interview(TextEnv):
    """Ask ``turns`` questions; each reply with a word of its question has the reward 1.

    Args:
        turns: number of questions, including the first.
        opening: number of tokens of the first question.
        answer: number of tokens of every later question, including line breaks around it.
    """

    def __init__(
        self, turns: int, opening: int, answer: int, *, render_mode: str | None = None
    ) -> None:
        super().__init__(render_mode=render_mode)
        self.max_turns, self.sizes = turns, (opening, answer - 2)
        self.asked, self.question = 0, ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Return the first question."""
        super().reset(seed=seed)
        self.asked = 1
        return self.opening(self._ask(self.sizes[0]))

    def step(self, action: str) -> Step:
        """Return the next question."""
        reward = float(bool(set(action.split()) & set(self.question.split())))
        over = self.asked == self.max_turns
        self.asked += 1
        return self.turn("" if over else self._ask(self.sizes[1]), reward, over, success=None)

    def _ask(self, count: int) -> str:
        self.question = words(count, random.Random(int(self.np_random.integers(2**31))))
        return self.question


gym.register("benchmarks/Interview-v0", entry_point=Interview)
