"""Define an environment with many turns and questions of fixed lengths."""

from __future__ import annotations

import random
import time
from typing import Any

import gymnasium as gym

from benchmarks.texts import random_words
from rlhf.envs.core import Step, TextEnv

ENV_ID = "benchmarks.multi_turn_env:benchmarks/Interview-v0"


class Interview(TextEnv):
    """An environment that asks ``turns`` questions.

    The reward of a reply is 1 if the reply contains a word of the question, otherwise 0.

    Args:
        turns: number of questions, including the first.
        first_tokens: number of tokens of the first question.
        later_tokens: number of tokens of every later question, including the line breaks before and
            after the question.
        delay: time that a step waits, in seconds.
    """

    def __init__(
        self,
        turns: int,
        first_tokens: int,
        later_tokens: int,
        delay: float = 0.0,
        *,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(render_mode=render_mode)
        self.delay = delay
        self.max_turns, self.sizes = turns, (first_tokens, later_tokens - 2)
        self.num_asked, self.question = 0, ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Return the first question."""
        super().reset(seed=seed)
        self.num_asked = 1
        return self.opening(self._new_question(self.sizes[0]))

    def step(self, action: str) -> Step:
        """Return the next question, and the reward of the reply to the previous question."""
        if self.delay:
            time.sleep(self.delay)
        reward = float(bool(set(action.split()) & set(self.question.split())))
        over = self.num_asked == self.max_turns
        self.num_asked += 1
        return self.turn(
            "" if over else self._new_question(self.sizes[1]), reward, over, success=None
        )

    def _new_question(self, num_words: int) -> str:
        """Return a question of ``num_words`` random words; store it to compute the next reward."""
        self.question = random_words(num_words, random.Random(int(self.np_random.integers(2**31))))
        return self.question


gym.register("benchmarks/Interview-v0", entry_point=Interview)
