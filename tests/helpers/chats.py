"""Chat sessions with saved models, and the replies of `rlhf generate` for comparison."""

from typing import Any

from rlhf.chat.policy import load_policies
from rlhf.chat.session import ChatSession
from rlhf.commands.generate import GenerateConfig, generate
from rlhf.common.ranges import convert_to_type
from rlhf.config.chat import ChatConfig
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import RolloutSpec

CALLBACKS = ("rng", "reward", "on_vote", "on_unvote")
GUESS = {"id": "text/GuessNumber-v0"}


def open_session(paths: list[str], **keys: Any) -> ChatSession:
    """A session with these models; `blind`, `rng`, `reward` and the callbacks are passed on."""
    own = {name: keys.pop(name) for name in CALLBACKS if name in keys}
    rollout = {"max_new_tokens": 12, **keys.pop("rollout", {})}
    config = convert_to_type(ChatConfig, {"models": paths, "rollout": rollout, **keys})
    policies = load_policies(config)
    return ChatSession(policies, config.env, seed=config.seed, blind=config.blind, **own)


def generated(folder: str, text: str, *, seed: int, samples: int = 1, **rollout: Any) -> list[str]:
    """Replies of `rlhf generate`."""
    spec = RolloutSpec(max_new_tokens=12, **rollout)
    config = GenerateConfig(
        ModelSpec(folder), prompt=text, samples=samples, rollout=spec, seed=seed
    )
    return list(generate(config))
