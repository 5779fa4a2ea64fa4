"""Append the votes of a chat to a file of labels, which can be used for training."""

from __future__ import annotations

import itertools
from typing import Any

from rlhf.chat.turn import Vote
from rlhf.common.conversation import Conversation
from rlhf.data.labels import in_canonical_order, item_id_of, new_label_row, new_undo_row
from rlhf.labeling.store import LabelFile


class VoteRecorder:
    """Appends votes to a file of labels of pairs, in the format of `rlhf label`.

    Args:
        file: The file.
        annotator: Id or pseudonym of the person who votes.

    Raises:
        UserError: The file has labels of another mode.
    """

    def __init__(self, file: LabelFile, annotator: str) -> None:
        file.check_mode("pairs", "labels")
        self._file, self._annotator = file, annotator

    def record(self, vote: Vote) -> None:
        """Append the pairs of a vote, all or none. They are on disk when this method returns."""
        self._file.append_together(pair_rows(vote, annotator=self._annotator))

    def take_back(self, vote_id: str) -> None:
        """Append rows that undo the pairs of a vote, all or none."""
        ids = {row["undoes"] for row in self._file.rows if "undoes" in row}
        rows = [row for row in self._file.rows if row.get("vote_id") == vote_id]
        self._file.append_together([new_undo_row(r) for r in rows if r["label_id"] not in ids])


def pair_rows(vote: Vote, *, annotator: str) -> list[dict[str, Any]]:
    """Return one row for each compared pair of replies.

    The preferred reply is compared with each other reply. At a tie, all replies are compared with
    each other. Replies with equal texts are not compared.
    """
    models = range(len(vote.models))
    if vote.preferred is None:
        pairs = list(itertools.combinations(models, 2))
    else:
        pairs = [(vote.preferred, other) for other in models if other != vote.preferred]
    texts = [reply.text if reply else "" for reply in vote.turn.replies]
    return [
        _pair_row(vote, first, second, annotator)
        for first, second in pairs
        if texts[first] != texts[second]
    ]


def _pair_row(vote: Vote, first: int, second: int, annotator: str) -> dict[str, Any]:
    """Return the label of one pair; if there is a preferred reply, it is that of ``first``."""
    prompt, order = vote.turn.prompts[first], vote.turn.order
    replies = {index: _reply_messages(vote, index) for index in (first, second)}
    ordered = in_canonical_order(replies.values())
    first_is_a = ordered[0] == replies[first]
    model_of = dict(zip("ab", (first, second) if first_is_a else (second, first), strict=True))
    label_id = f"{vote.vote_id}-{first}{second}"
    base = new_label_row(label_id, item_id_of(prompt, ordered), mode="pairs", annotator=annotator)
    is_tie = vote.preferred is None
    return base | {
        "prompt": prompt,
        "response_a": ordered[0],
        "response_b": ordered[1],
        "shown_first": min("ab", key=lambda side: order.index(model_of[side])),
        "winner": "tie" if is_tie else "a" if first_is_a else "b",
        "margin": 0 if is_tie else 1,
        "vote_id": vote.vote_id,
        "models": {side: vote.models[index] for side, index in model_of.items()},
        "blind": vote.blind,
        "seed": vote.seed,
    }


def _reply_messages(vote: Vote, index: int) -> Conversation:
    reply = vote.turn.replies[index]
    assert reply is not None
    return [{"role": "assistant", "content": reply.text}]
