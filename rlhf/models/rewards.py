"""Learned rewards run by the quick passes that training uses."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rlhf import reward_models
from rlhf.reward_models.core import Reward

R = TypeVar("R", bound=Reward)


def load_rewards(spec: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Reward:
    """As ``rlhf.reward_models.build``, then ``packed``.

    Raises:
        ValueError: as ``build``.
    """
    return packed(reward_models.build(spec))


def packed(reward: R) -> R:
    """The reward itself, whose decoders read texts without padding from now on.

    What neighbouring texts share at their beginning, as the replies to one prompt do, is computed
    once. Scores stay the same to rounding. A decoder whose scores would not, and every encoder, is
    left to padded batches.
    """
    decoders = [found for found in reward.checkpoints() if found.sidecar.pooling == "last"]
    if decoders:  # rules need no torch
        from rlhf.models.fast.packing import hidden_states
        from rlhf.models.fast.verification import enable_fast_paths
    for found in decoders:
        if enable_fast_paths(found.model):
            found.read_packed(functools.partial(hidden_states, found.model))
    return reward
