"""Compute the score that a reply would have if it ended at each of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rlhf.explain.encoding import EncodedConversation
from rlhf.explain.score_function import DifferentiableReward


@dataclass(frozen=True)
class PrefixCurve:
    """The scores of prefixes of one reply."""

    tokens: list[int]
    """Number of tokens of the reply in each prefix, [N], ascending."""
    scores: list[float]
    """Score of each prefix, [N]; the last one is the score of the whole reply."""


def prefix_curve(
    reward: DifferentiableReward,
    encoded: EncodedConversation,
    constants: Mapping[int, float],
    *,
    max_points: int = 48,
) -> PrefixCurve:
    """Score prefixes of a reply, each followed by the tokens that end the conversation.

    Each prefix ends like a whole reply, for example with EOS, so the head reads the same kind of
    token as in training. Reading the head at earlier tokens, as `LearnedReward.prefix_scores`
    does, is faster but out of distribution. The scores of parts without a model are those of the
    whole reply. The lists are empty if the reply has no tokens.

    Args:
        reward: The reward.
        encoded: The conversation.
        constants: Result of `DifferentiableReward.scores_without_models`.
        max_points: Maximum number of prefixes, at equal distances.
    """
    positions = encoded.positions("reply")
    if not positions:
        return PrefixCurve([], [])
    ending = encoded.ids[positions[-1] + 1 :]
    count = min(max_points, len(positions))
    chosen = np.unique(np.linspace(1, len(positions), count).round().astype(int))
    texts = [[*encoded.ids[: positions[n - 1] + 1], *ending] for n in chosen]
    return PrefixCurve(chosen.tolist(), reward.scores_of_ids(texts, constants))
