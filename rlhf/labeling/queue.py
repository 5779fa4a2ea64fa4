"""Order the items to label, and insert check items with known labels."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.common.conversation import Conversation
from rlhf.config.labeling import LabelOrder
from rlhf.errors import UserError
from rlhf.labeling.items import LabelItem
from rlhf.reward_models.core import Reward, Score

log = logging.getLogger(__name__)


MIN_SUSPICION_ITEMS = 20
"""Minimum number of labeled pairs to fit the models for the order by suspicion."""


def order_items(
    items: Sequence[LabelItem],
    order: LabelOrder,
    *,
    seed: int,
    load_rewards: Callable[[], Sequence[Reward]],
) -> list[LabelItem]:
    """Return the items in the order in which they are labeled.

    Args:
        items: The items; for disagreement and suspicion they are pairs.
        order: See `LabelOrder`.
        seed: Seed of the random order, and of the cross-validation folds for suspicion.
        load_rewards: Function that loads the members of the ensemble, called for disagreement.

    Raises:
        UserError: The order needs several reward models, or more pairs, all with labels.
    """
    if order == "random":
        return random.Random(seed).sample(list(items), len(items))
    if order == "disagreement":
        keys = margin_disagreement(items, ensemble_members(load_rewards()))
    elif order == "suspicion":
        keys = label_suspicion(items, seed=seed)
    else:
        return list(items)
    ranks = np.argsort(-np.nan_to_num(keys, nan=-np.inf), kind="stable")
    return [items[index] for index in ranks]


Member = Callable[[Sequence[Conversation]], Sequence[Score]]
"""Function that scores conversations."""


def ensemble_members(rewards: Sequence[Reward]) -> list[Member]:
    """Return the members of an ensemble.

    Args:
        rewards: Several rewards, or one that is an ensemble of models or of heads.

    Raises:
        UserError: There are fewer than two members.
    """
    from rlhf.reward_models.ensemble import Ensemble, HeadEnsemble  # imports torch

    members: list[Member] = []
    for reward in rewards:
        if isinstance(reward, HeadEnsemble):
            heads = [f"{reward.name}.{part}" for part in reward.inner.parts]
            members += [_member_from_component(reward, head) for head in heads]
        elif isinstance(reward, Ensemble):
            members += [_member_from_reward(member) for member in reward.inner_rewards]
        else:
            members.append(_member_from_reward(reward))
    if len(members) < 2:
        raise UserError(
            "order: disagreement needs rewards with at least two members: several reward models, "
            "or one of kind ensemble or heads"
        )
    return members


def _member_from_reward(reward: Reward) -> Member:
    return lambda conversations: reward.score(conversations).values


def _member_from_component(reward: Reward, name: str) -> Member:
    return lambda conversations: reward.score(conversations).components[name]


def margin_disagreement(items: Sequence[LabelItem], members: Sequence[Member]) -> np.ndarray:
    """Return the disagreement of an ensemble about each of N pairs, [N].

    The disagreement is the standard deviation, over the members, of the margin (score of the first
    reply minus that of the second). Each member's margins are divided by their root mean square
    first, because members can have different scales. The value is nan for a pair that a member
    cannot score.
    """
    conversations = [[*item.prompt, *reply] for item in items for reply in item.replies]
    margins = []
    for member in members:
        scores = np.array(member(conversations), dtype=float)  # None becomes nan
        margin = scores[0::2] - scores[1::2]
        known = margin[np.isfinite(margin)]
        scale = float(np.sqrt(np.mean(known**2))) if known.size else 0.0
        margins.append(margin / scale if scale > 0 else margin)
    return np.std(margins, axis=0)


def label_suspicion(items: Sequence[LabelItem], *, seed: int) -> np.ndarray:
    """Return the degree to which a model of the other pairs disagrees with each label, [N].

    The value is the negative cross-fitted margin, see `rlhf.data.suspects`.

    Raises:
        UserError: Some pairs have no label, or there are too few pairs or prompts.
    """
    from rlhf.data.suspects import cross_fitted_margins

    if any(item.best is None for item in items):
        raise UserError("order: suspicion needs pairs with labels: chosen and rejected")
    if len(items) < MIN_SUSPICION_ITEMS:
        raise UserError(
            f"order: suspicion needs at least {MIN_SUSPICION_ITEMS} pairs, got {len(items)}"
        )
    fitted = cross_fitted_margins([_preference_row(item) for item in items], seed=seed)
    log.info(
        "order: a bag-of-words model predicts %.0f%% of the held-out labels; near 50%% the order "
        "is uninformative",
        100 * fitted.accuracy,
    )
    return -fitted.margin


def _preference_row(item: LabelItem) -> Mapping[str, Any]:
    best = item.best or 0
    return {
        "prompt": item.prompt,
        "chosen": item.replies[best],
        "rejected": item.replies[1 - best],
    }


def insert_check_items(
    items: Sequence[LabelItem], checks: Sequence[LabelItem], *, every: int, seed: str
) -> list[LabelItem]:
    """Insert one check item at a random position in each block, until all are used.

    A check item is used at most once. Items that are also check items are removed from ``items``.

    Args:
        items: Ordered items.
        checks: Check items, which are shuffled.
        every: Size of a block, including the check item; at least 2.
        seed: Seed of the positions and of the order of the check items.
    """
    rng = random.Random(seed)
    known = {item.item_id for item in checks}
    rest = [item for item in items if item.item_id not in known]
    queue: list[LabelItem] = []
    shuffled = rng.sample(list(checks), len(checks))
    for start in range(0, len(rest), every - 1):
        block = rest[start : start + every - 1]
        if shuffled:
            block.insert(rng.randint(0, len(block)), shuffled.pop())
        queue += block
    return queue
