"""Build learned rewards that use the fast forward passes of training."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rlhf import reward_models
from rlhf.reward_models.core import Reward

R = TypeVar("R", bound=Reward)


def load_rewards(spec: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Reward:
    """Build rewards with ``rlhf.reward_models.build``, and enable packing.

    Raises:
        ValueError: as ``build``.
    """
    return with_packing(reward_models.build(spec))


def with_packing(reward: R) -> R:
    """Enable packing in the decoders of a reward; return the reward.

    Prefixes that neighboring texts share, such as a common prompt, are computed once. Scores are
    equal up to rounding. Encoders, and decoders whose states would change, use padded batches.
    """
    decoders = [c for c in reward.checkpoints() if c.sidecar.pooling == "last"]
    if decoders:  # rewards without models do not import torch
        from rlhf.models.fast.packing import flat_hidden_states
        from rlhf.models.fast.verification import enable_fast_paths
    for checkpoint in decoders:
        if enable_fast_paths(checkpoint.model):
            checkpoint.use_packed_hidden_states(
                functools.partial(flat_hidden_states, checkpoint.model)
            )
    return reward
