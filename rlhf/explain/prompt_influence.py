"""Measure how a margin depends on the prompt: by attribution, and by replacing the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.common.conversation import Conversation
from rlhf.explain.margins import margins
from rlhf.reward_models.core import Reward
from rlhf.reward_models.pairs import Pair
from rlhf.stats import Interval, interval


@dataclass(frozen=True)
class PromptInfluence:
    """The margin of a pair with its own prompt, without it, and with prompts of other pairs."""

    share: float | None
    """Share of the prompt in the sum of the absolute attributions to prompt and replies; None if
    no attribution to the prompt differs from 0."""
    without_prompt: float | None
    """Margin if all messages of the prompt are empty; None if this cannot be scored."""
    other_prompts: Interval | None
    """Mean margin after the prompts of other pairs; None if no such margin can be computed."""


def prompt_influence(
    reward: Reward, pair: Pair, other_prompts: Sequence[Conversation], *, share: float | None
) -> PromptInfluence:
    """Score both replies of a pair without the prompt, and after other prompts.

    Args:
        reward: The reward.
        pair: The pair.
        other_prompts: Prompts of other pairs.
        share: See `PromptInfluence.share`.
    """
    start = len(pair.prompt)
    empty = [{**message, "content": ""} for message in pair.prompt]
    without, *others = margins(
        reward,
        [
            ([*prompt, *pair.chosen[start:]], [*prompt, *pair.rejected[start:]])
            for prompt in (empty, *other_prompts)
        ],
    )
    known = [margin for margin in others if margin is not None]
    return PromptInfluence(share, without, interval(known) if known else None)
