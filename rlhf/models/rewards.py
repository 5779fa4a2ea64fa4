"""Build rewards whose models use the same fast forward passes as training."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rlhf import reward_models
from rlhf.common.score_names import GOLD, OTHER_METRICS, SCORE
from rlhf.errors import UserError
from rlhf.reward_models.core import Reward, check_unique_names

R = TypeVar("R", bound=Reward)


def load_rewards(spec: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Reward:
    """Build rewards with ``rlhf.reward_models.build``, and enable packing.

    Raises:
        ValueError: The specification is invalid (see ``build``).
    """
    return enable_reward_packing(reward_models.build(spec))


def check_component_names(
    rewards: Reward | None, gold: Reward | None = None, *, has_env: bool, trains: bool = False
) -> None:
    """Check that no component of rewards has the name of another metric of the same episodes.

    Args:
        rewards: The rewards that are trained on or evaluated, if there are any.
        gold: The rewards that are only measured, if there are any.
        has_env: Whether the episodes have an environment, which can report a cost.
        trains: Whether `rewards` are trained on. None of them may then have the name of the gold
            score, because their values would be reported as the gold score.

    Raises:
        UserError: A name is reserved, or two components have the same name.
    """
    sums = {SCORE: rewards, GOLD: gold}
    leaves = [leaf for reward in sums.values() if reward is not None for leaf in reward.leaves()]
    check_unique_names(leaves)
    reserved = {*OTHER_METRICS, *(("cost",) if has_env else ())}
    for leaf in leaves:
        # The sum of one reward without weight or clipping is the component itself.
        is_sum = sums.get(leaf.name) is not None and sums[leaf.name] is not leaf
        is_sum |= trains and leaf.name == GOLD and gold is None
        if leaf.name in reserved or "pass@" in leaf.name or is_sum:
            raise UserError(
                f"a reward is named {leaf.name!r}, which is the name of another metric: set "
                "another `name`"
            )


def enable_reward_packing(reward: R) -> R:
    """Enable packing in the decoders of a reward, and return the reward.

    With packing, a prefix that neighboring texts share, such as a common prompt, is computed once.
    The scores are equal up to rounding. Encoders use padded batches, and so do decoders whose
    hidden states would change with packing.
    """
    decoders = [c for c in reward.learned_rewards() if c.sidecar.pooling == "last"]
    if decoders:  # rewards without models do not import torch
        from rlhf.models.fast.packing import flat_states_and_token_index
        from rlhf.models.fast.verification import enable_fast_paths
    for checkpoint in decoders:
        if enable_fast_paths(checkpoint.model):
            checkpoint.use_packed_hidden_states(
                functools.partial(flat_states_and_token_index, checkpoint.model)
            )
    return reward
