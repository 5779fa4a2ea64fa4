"""Composable rewards with one interface: learned models, rules, judges and code execution.

``import rlhf.reward_models`` does not import torch; names that need torch are imported on first
use.
"""

import importlib
from typing import TYPE_CHECKING

from rlhf.reward_models.adapters import as_reward, as_trl
from rlhf.reward_models.core import PerConversationReward, Reward, Scores
from rlhf.reward_models.registry import KINDS, build

if TYPE_CHECKING:
    from rlhf.reward_models.chat_template import encode_conversation
    from rlhf.reward_models.learned import LearnedReward
    from rlhf.reward_models.sidecar import Sidecar

if __name__ != "rlhf.reward_models":  # a second import would define each class twice
    raise ImportError("import rlhf.reward_models instead of reward_models")

_LAZY = {
    "LearnedReward": "rlhf.reward_models.learned",
    "Sidecar": "rlhf.reward_models.sidecar",
    "encode_conversation": "rlhf.reward_models.chat_template",
}

__all__ = [
    "KINDS",
    "LearnedReward",
    "PerConversationReward",
    "Reward",
    "Scores",
    "Sidecar",
    "as_reward",
    "as_trl",
    "build",
    "encode_conversation",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rlhf.reward_models' has no attribute {name!r}")
