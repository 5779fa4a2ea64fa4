"""Start the conversation of an episode, and step an environment with the text of a reply.

These functions do not depend on tokens, so that every kind of policy plays the same episodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym

from rlhf.config.rollout import RolloutSpec
from rlhf.data.conversation import insert_after_system
from rlhf.reward_models.chat_template import tools_of, with_tools
from rlhf.rollout.actions import text_to_action
from rlhf.rollout.environments.calls import step_environment

StepResult = tuple[str, float, bool, bool, Mapping[str, Any]]
"""Observation, reward, terminated, truncated and info of an environment's step."""


def opening_messages(
    env: gym.Env,
    observation: str,
    info: Mapping[str, Any],
    spec: RolloutSpec,
    examples: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Return the conversation before the first reply of an episode.

    Args:
        env: The environment, which may have a ``system_prompt``.
        observation: First observation.
        info: The environment's ``info`` of the start state. Its ``messages`` precede the
            observation. The keys of ``message``, if it is a mapping, are added to the last message.
        spec: Sampling settings, which may have a system message.
        examples: Messages that are inserted after the system message.
    """
    # An environment of prompts returns the message of the data row. Its additional keys, such as
    # the reference answer, are used by rewards. Other environments may use the key "message" for a
    # value of any type.
    message = info.get("message")
    keys = message if isinstance(message, Mapping) else {}
    first = {"role": "user", **keys, "content": observation}
    system = getattr(env.unwrapped, "system_prompt", None)
    return with_system_and_examples(
        [*info.get("messages", ()), first], spec, system=system, examples=examples
    )


def with_system_and_examples(
    messages: Sequence[Any],
    spec: RolloutSpec,
    *,
    system: str | None,
    examples: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Add the system message and the examples to ``messages``.

    The system message is ``rollout.system`` if it is set. Otherwise, it is the system message in
    ``messages`` or, if there is none, the argument ``system`` (that of the environment).
    """
    tools = tools_of(messages)
    messages = [dict(message) for message in messages]
    if spec.system and messages[0]["role"] == "system":
        messages = messages[1:]
    system = spec.system or system
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return with_tools(insert_after_system(messages, examples), tools)


def step_with_reply(env: gym.Env, text: str, spec: RolloutSpec) -> StepResult:
    """Step an environment with a reply; see `step_environment`.

    If the reply contains no valid action, the environment is not called. The reward is then
    ``rollout.invalid_reward``, and ``rollout.invalid`` determines whether the episode ends.
    """
    action = text_to_action(text, env)
    if action is not None:
        return step_environment(env, action)
    space: Any = env.action_space
    last = space.start + space.n - 1
    hint = f"That is no action. Answer with a number from {space.start} to {last}."
    return hint, spec.invalid_reward, spec.invalid == "end", False, {"valid": False}
