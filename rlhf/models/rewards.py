"""Rewards of a configuration, their learned models run by the quick passes of ours."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import reward_models
from reward_models.core import Reward


def load_rewards(spec: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Reward:
    """As ``reward_models.build``; decoders then read texts without padding.

    What neighbouring texts share at their beginning, as the replies to one prompt do, is computed
    once. Scores stay the same to rounding, and a model of another architecture as it is.

    Raises:
        ValueError: as ``build``.
    """
    reward = reward_models.build(spec)
    checkpoints = reward.checkpoints()
    if checkpoints:  # rules need no torch
        from rlhf.models.packing import hidden_states, use_fast_passes
    for learned in checkpoints:
        if learned.sidecar.pooling == "last" and use_fast_passes(learned.model):
            learned.read_packed(functools.partial(hidden_states, learned.model))
    return reward
