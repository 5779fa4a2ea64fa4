"""Votes of a chat as labels of pairs, which are training data."""

from __future__ import annotations

import datetime
import itertools
import secrets
from typing import Any

from rlhf.chat.session import Vote
from rlhf.common.conversation import Conversation
from rlhf.data.labels import in_canonical_order, item_id_of


def label_rows(vote: Vote, *, annotator: str) -> list[dict[str, Any]]:
    """Return the rows of a vote, in the format of `rlhf label` (`rlhf.data.labels`).

    The preferred reply is compared with each other reply. At a tie, all replies are compared with
    each other. Replies with equal texts are not compared.

    Args:
        vote: The vote.
        annotator: Id or pseudonym of the person who votes.
    """
    models = range(len(vote.models))
    if vote.preferred is None:
        pairs = list(itertools.combinations(models, 2))
    else:
        pairs = [(vote.preferred, other) for other in models if other != vote.preferred]
    texts = [reply.text if reply else "" for reply in vote.turn.replies]
    return [
        _label_row(vote, first, second, annotator)
        for first, second in pairs
        if texts[first] != texts[second]
    ]


def _label_row(vote: Vote, first: int, second: int, annotator: str) -> dict[str, Any]:
    """Return the label of one pair; if there is a preferred reply, it is that of ``first``."""
    prompt = vote.turn.prompts[first]
    replies = {index: _reply_messages(vote, index) for index in (first, second)}
    ordered = in_canonical_order(replies.values())
    if ordered[0] == replies[first]:
        sides, winner = (first, second), "a"
    else:
        sides, winner = (second, first), "b"
    order = vote.turn.order
    return {
        "label_id": secrets.token_hex(8),
        "item_id": item_id_of(prompt, ordered),
        "mode": "pairs",
        "annotator": annotator,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "prompt": prompt,
        "response_a": ordered[0],
        "response_b": ordered[1],
        "shown_first": min("ab", key=lambda side: order.index(sides["ab".index(side)])),
        "winner": "tie" if vote.preferred is None else winner,
        "margin": 0 if vote.preferred is None else 1,
        "models": {side: vote.models[index] for side, index in zip("ab", sides, strict=True)},
        "blind": vote.blind,
        "seed": vote.seed,
    }


def _reply_messages(vote: Vote, index: int) -> Conversation:
    reply = vote.turn.replies[index]
    assert reply is not None
    return [{"role": "assistant", "content": reply.text}]
