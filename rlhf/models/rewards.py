"""Build rewards whose models use the same fast forward passes as training."""

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
        ValueError: The specification is invalid (see ``build``).
    """
    return with_packing(reward_models.build(spec))


def with_packing(reward: R) -> R:
    """Enable packing in the decoders of a reward, and return the reward.

    With packing, a prefix that neighboring texts share, such as a common prompt, is computed once.
    The scores are equal up to rounding. Encoders use padded batches, and so do decoders whose
    hidden states would change with packing.
    """
    decoders = [c for c in reward.checkpoints() if c.sidecar.pooling == "last"]
    if decoders:  # rewards without models do not import torch
        from rlhf.models.fast.packing import hidden_states_and_index
        from rlhf.models.fast.verification import enable_fast_paths
    for checkpoint in decoders:
        if enable_fast_paths(checkpoint.model):
            checkpoint.use_packed_hidden_states(
                functools.partial(hidden_states_and_index, checkpoint.model)
            )
    return reward
