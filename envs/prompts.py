"""A single-turn environment over a list of prompts, as in RLHF with a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from rlhf.common.conversation import Conversation, RewardFunction
from rlhf.envs.core import Step, TextEnv
from rlhf.errors import UserError

EXAMPLE_PROMPTS = (
    "Name a color.",
    "What is a good name for a cat?",
    "Say something kind to a stranger.",
)
"""Prompts that are used by default, for a first test."""


class PromptEnv(TextEnv):
    """Reply to a prompt from a list, in one turn; a reward function scores the reply.

    State: a prompt. Observation: its text; if the prompt is a conversation, the text of its last
    message. `info["messages"]` contains the earlier messages, and `info["message"]` is the last
    message with all its keys. Action: any text. Reward: the score of the whole conversation that
    `reward` returns. If `reward` is None or returns None, the reward is 0.0 and `info["scored"]` is
    False.

    `reset(seed=s)` selects prompt `s % n` of a fixed shuffle of the n prompts, so n consecutive
    seeds select each prompt once. `info["prompt_index"]` is the index in `prompts`.

    Args:
        prompts: Texts, or conversations that end with a user message or a tool result.
        reward: Function that scores a batch of conversations; it is called with a batch of one.
        system_prompt: System message of every episode.

    Raises:
        UserError: `prompts` is a single text or is empty, or a conversation ends neither with a
            user message nor with a tool result.
    """

    items = "Prompts; a run holds out a fraction of them (evaluation.prompts_fraction)."

    def __init__(
        self,
        prompts: Sequence[str | Conversation] = EXAMPLE_PROMPTS,
        *,
        reward: RewardFunction | None = None,
        system_prompt: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(render_mode=render_mode)
        if isinstance(prompts, str) or not prompts:
            raise UserError("prompts must be a list of at least one text or conversation")
        self.system_prompt = system_prompt
        self._conversations = [_as_conversation(prompt, i) for i, prompt in enumerate(prompts)]
        self._order = np.random.default_rng(0).permutation(len(prompts)).tolist()
        self._reward = reward
        self._index = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        gym.Env.reset(self, seed=seed)
        count = len(self._order)
        position = int(self.np_random.integers(count)) if seed is None else seed % count
        self._index = self._order[position]
        *earlier, last = self._conversations[self._index]
        messages = [dict(message) for message in earlier]
        return self.opening(
            last["content"],
            prompt_index=self._index,
            messages=messages,
            message=dict(last),
            scored=False,
        )

    def step(self, action: str) -> Step:
        score = self._score(action)
        return self.turn(
            "",
            0.0 if score is None else score,
            True,
            success=None,
            prompt_index=self._index,
            scored=score is not None,
        )

    def legal_actions(self) -> list[str]:
        """Return three example replies; every text is allowed."""
        return ["Yes.", "No.", "I do not know."]

    def _score(self, action: str) -> float | None:
        if self._reward is None:
            return None
        conversation = [dict(message) for message in self._conversations[self._index]]
        if self.system_prompt is not None and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": self.system_prompt})
        (score,) = self._reward([[*conversation, {"role": "assistant", "content": action}]])
        return None if score is None else float(score)


def _as_conversation(prompt: str | Conversation, index: int) -> Conversation:
    """Convert a prompt to a list of messages.

    Raises:
        UserError: The last message is neither a user message nor a tool result. The message
            contains `index`.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not prompt or prompt[-1].get("role") not in ("user", "tool"):
        raise UserError(
            f"prompts[{index}] must end with a user message or a tool result, got {prompt[-1:]!r}"
        )
    return [dict(message) for message in prompt]
