"""Measure how a margin depends on the prompt: by attribution, and by replacing the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.common.conversation import Conversation
from rlhf.reward_models.core import Reward
from rlhf.reward_models.pairs import Pair
from rlhf.stats import Interval, interval


@dataclass(frozen=True)
class PromptInfluence:
    """The margin of a pair with its own prompt, without it, and with prompts of other pairs."""

    share: float | None
    """Share of the prompt in the sum of the absolute attributions to prompt and replies; None if
    there are no attributions."""
    without_prompt: float | None
    """Margin if all messages of the prompt are empty; None if this cannot be scored."""
    other_prompts: Interval | None
    """Mean margin after the prompts of other pairs; None if there are no other prompts."""


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
    empty = [{**message, "content": ""} for message in pair.prompt]
    margins = margins_after_prompts(reward, pair, [empty, *other_prompts])
    known = [margin for margin in margins[1:] if margin is not None]
    return PromptInfluence(share, margins[0], interval(known) if known else None)


def margins_after_prompts(
    reward: Reward, pair: Pair, prompts: Sequence[Conversation]
) -> list[float | None]:
    """Return the margin of the two replies of a pair after each of N prompts, [N]."""
    start = len(pair.prompt)
    conversations = [
        [*prompt, *reply[start:]] for reply in (pair.chosen, pair.rejected) for prompt in prompts
    ]
    values = reward.score(conversations).values
    return [
        None if a is None or b is None else a - b
        for a, b in zip(values[: len(prompts)], values[len(prompts) :], strict=True)
    ]
