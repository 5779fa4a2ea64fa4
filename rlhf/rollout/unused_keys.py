"""Find a key of ``rollout`` that has no effect with a model and an environment."""

from __future__ import annotations

from gymnasium.spaces import Discrete

from rlhf.config.rollout import RolloutSpec
from rlhf.rollout.collector import Collector


def unused_rollout_key_message(collector: Collector) -> str:
    """Return a message if ``separator``, ``stop``, ``invalid`` or ``invalid_reward`` has no effect.

    The message gives the reason. The result is "" if all of these keys that differ from their
    defaults have an effect.
    """
    rollout, defaults = collector.spec, RolloutSpec
    if collector.chat_format.chat:
        for key in ("separator", "stop"):
            if getattr(rollout, key) != getattr(defaults, key):
                return f"rollout.{key} has no effect: the chat template ends turns"
    keys = [k for k in ("invalid", "invalid_reward") if getattr(rollout, k) != getattr(defaults, k)]
    if not keys:
        return ""
    env = collector.make_env()
    is_discrete = isinstance(env.action_space, Discrete)
    env.close()
    if is_discrete:
        return ""
    return (
        f"rollout.{keys[0]} has no effect: the actions of this environment are text, and the "
        "environment handles invalid replies"
    )
