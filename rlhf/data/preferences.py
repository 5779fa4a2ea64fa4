"""Create preference pairs from rankings, from ratings, or with a simulated annotator.

A simulated annotator compares replies by their gold scores. Its parameters are known, so estimates
of accuracy, temperature, length bias and label noise can be compared with the true values.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.common.conversation import Conversation
from rlhf.common.ranges import Finite, LabelNoise, NonNegativeFloat, check_fields
from rlhf.data.conversation import as_conversation, checked_prompt, split_reply_from_prompt
from rlhf.data.load import LoadedRows
from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.reward_models.core import sigmoid

Reply = Conversation | RowDropped
"""A reply, or the reason why it cannot be used."""

GoldFunction = Callable[[list[Conversation]], Sequence[float | None]]
"""Function that returns a score, or None, for each conversation (prompt and reply)."""


@dataclass(frozen=True)
class SimulatedAnnotator:
    """A simulated annotator that compares reply A, which is shown first, with reply B.

    P(A chosen) = sigmoid((g_A - g_B) / tau + length_bias * (n_A - n_B) / 100 + position_bias),
    with gold scores g and lengths n in characters. The label is then flipped with probability
    `flip`. Without biases and flips this is the model of Bradley and Terry (1952).
    """

    tau: NonNegativeFloat = 1.0
    """Temperature in units of the gold score. At 0, the reply with the higher score is chosen
    before the label flips, and the biases decide only between equal scores."""
    flip: LabelNoise = 0.0
    """Probability that the label is flipped."""
    length_bias: Finite = 0.0
    """Log-odds in favor of A for each 100 characters by which A is longer than B."""
    position_bias: Finite = 0.0
    """Log-odds in favor of the reply that is shown first."""

    def __post_init__(self) -> None:
        check_fields(self, "annotator.")

    def first_reply_probability(self, gold_gap: float, length_gap: float) -> float:
        """Return the probability that the first reply is chosen, after label flips.

        Args:
            gold_gap: Gold score of the first reply minus that of the second.
            length_gap: Characters of the first reply minus those of the second.
        """
        biases = self.length_bias * length_gap / 100 + self.position_bias
        if self.tau == 0 and gold_gap != 0:
            probability = float(gold_gap > 0)
        else:
            probability = sigmoid((gold_gap / self.tau if gold_gap else 0.0) + biases)
        return (1 - self.flip) * probability + self.flip * (1 - probability)


def pairs_from_gold(
    rows: Sequence[Mapping[str, Any]],
    gold: GoldFunction | None,
    *,
    annotator: SimulatedAnnotator,
    pairs_per_prompt: int,
    seed: int,
) -> LoadedRows:
    """Create preference rows from sampled replies, labeled by a simulated annotator.

    Args:
        rows: Rows with `prompt` (text or Conversation) and `replies` (at least two).
        gold: The gold reward, which is called once with all conversations. If it is None, every row
            has `scores`, the gold score of each reply. These scores may depend on a hidden state,
            so that equal conversations of different rows can have different scores.
        annotator: The annotator that labels the pairs.
        pairs_per_prompt: Maximum number of random pairs of replies per row.
        seed: Seed of the pairs, of the order in which replies are shown, and of the labels.

    Returns:
        Preference rows with `gold_margin`, the gold score of the chosen reply minus that of the
        rejected reply, which is negative if the reply with the lower score was chosen. `total` is
        the number of pairs. Pairs with an invalid or unscored reply, or with equal replies, are
        dropped.

    Raises:
        UserError: `pairs_per_prompt` is less than 1, or a prompt is not valid.
    """
    if pairs_per_prompt < 1:
        raise UserError(f"pairs_per_prompt must be >= 1, got {pairs_per_prompt}")
    rng = random.Random(seed)
    sampled = [_prompt_and_replies(row, index) for index, row in enumerate(rows)]
    scores = _scores_by_reply(rows, sampled, gold)
    preferences, dropped = [], Counter()
    for row, (prompt, replies), golds in zip(rows, sampled, scores, strict=True):
        scored = list(zip(replies, golds, strict=True))
        pairs = list(itertools.combinations(scored, 2))
        for pair in rng.sample(pairs, min(pairs_per_prompt, len(pairs))):
            first, second = rng.sample(pair, 2)
            try:
                labels = _label_pair(first, second, annotator=annotator, rng=rng)
            except RowDropped as reason:
                dropped[str(reason)] += 1
            else:
                source = row.get("source", "gold")
                preferences.append({"prompt": prompt, **labels, "source": source})
    return _loaded_from_rows(preferences, dropped)


def _scores_by_reply(
    rows: Sequence[Mapping[str, Any]],
    sampled: Sequence[tuple[Conversation, list[Reply]]],
    gold: GoldFunction | None,
) -> list[list[float | None]]:
    """Return the gold score of each reply of each row.

    These are the scores in the rows if ``gold`` is None. Otherwise, the score of a reply that
    cannot be used is None.
    """
    if gold is None:
        return [list(row["scores"]) for row in rows]
    values = iter(
        gold([prompt + r for prompt, replies in sampled for r in replies if isinstance(r, list)])
    )
    return [
        [next(values) if isinstance(reply, list) else None for reply in replies]
        for _, replies in sampled
    ]


def pairs_from_ratings(rows: Sequence[Mapping[str, Any]], *, min_gap: float = 0.0) -> LoadedRows:
    """Convert rows {prompt, replies, ratings} to all pairs of replies with different ratings.

    The `margin` of a pair is the difference of its ratings. Pairs whose difference is not larger
    than `min_gap` are dropped as ties.

    Raises:
        UserError: A row does not have one rating per reply, or a prompt is not valid.
    """
    return _pairs_by_score(rows, "ratings", min_gap=min_gap, with_margin=True)


def pairs_from_rankings(rows: Sequence[Mapping[str, Any]]) -> LoadedRows:
    """Convert rows {prompt, replies, ranks} to all pairs of replies with different ranks.

    The lowest rank is the best; pairs with equal ranks are dropped as ties. If a row has no
    `ranks`, its replies are ordered from best to worst. A ranking of K replies gives up to
    K (K - 1) / 2 pairs with the same prompt, which should be in the same split.

    Raises:
        UserError: A row does not have one rank per reply, or a prompt is not valid.
    """
    ranked = [
        {**row, "ranks": [-rank for rank in row.get("ranks", range(len(row["replies"])))]}
        for row in rows
    ]
    return _pairs_by_score(ranked, "ranks", min_gap=0.0, with_margin=False)


def inject_label_noise(
    rows: Sequence[Mapping[str, Any]], rate: float, *, seed: int
) -> list[dict[str, Any]]:
    """Copy n preference or label rows, and reverse the labels of round(rate * n) random copies.

    Every copy has the key `flipped` (bool), with which a search for wrong labels can be evaluated.

    Raises:
        UserError: `rate` is not in [0, 1].
    """
    if not 0 <= rate <= 1:
        raise UserError(f"rate must be between 0 and 1, got {rate}")
    flipped = set(random.Random(seed).sample(range(len(rows)), round(rate * len(rows))))
    return [
        {
            **row,
            **(_reversed_label_cells(row) if index in flipped else {}),
            "flipped": index in flipped,
        }
        for index, row in enumerate(rows)
    ]


def _reversed_label_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    if "chosen" in row:
        margin = {"gold_margin": -row["gold_margin"]} if "gold_margin" in row else {}
        return {"chosen": row["rejected"], "rejected": row["chosen"], **margin}
    return {"label": not row["label"]}


def _label_pair(
    first: tuple[Reply, float | None],
    second: tuple[Reply, float | None],
    *,
    annotator: SimulatedAnnotator,
    rng: random.Random,
) -> dict[str, Any]:
    """Return the cells of a pair that an annotator labels, given as two (reply, gold score).

    Raises:
        RowDropped: The replies are equal, or a reply is not valid or has no score.
    """
    a, b = _require_usable_different_replies(first[0], second[0])
    gold_a, gold_b = first[1], second[1]
    if gold_a is None or gold_b is None:
        raise RowDropped("reply without a gold score")
    gap = gold_a - gold_b
    if rng.random() < annotator.first_reply_probability(
        gap, _num_characters(a) - _num_characters(b)
    ):
        return {"chosen": a, "rejected": b, "gold_margin": gap}
    return {"chosen": b, "rejected": a, "gold_margin": -gap}


def _pairs_by_score(
    rows: Sequence[Mapping[str, Any]], field: str, *, min_gap: float, with_margin: bool
) -> LoadedRows:
    """Return the pairs of replies whose scores in `field` differ by more than `min_gap`.

    The reply with the higher score is chosen. `with_margin` adds the difference as `margin`.

    Raises:
        UserError: A row does not have one score per reply, or a prompt is not valid.
    """
    preferences, dropped = [], Counter()
    for index, row in enumerate(rows):
        prompt, replies = _prompt_and_replies(row, index)
        if len(replies) != len(row[field]):
            raise UserError(f"row {index}: {len(replies)} replies but {len(row[field])} {field}")
        scored = sorted(zip(row[field], replies, strict=True), key=lambda pair: -pair[0])
        for (high, better), (low, worse) in itertools.combinations(scored, 2):
            if high - low <= min_gap:
                dropped["tie"] += 1
                continue
            try:
                chosen, rejected = _require_usable_different_replies(better, worse)
            except RowDropped as reason:
                dropped[str(reason)] += 1
                continue
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            pair |= {"margin": float(high - low)} if with_margin else {}
            preferences.append(pair | {"source": row.get("source", field)})
    return _loaded_from_rows(preferences, dropped)


def _loaded_from_rows(rows: list[dict[str, Any]], dropped: Counter[str]) -> LoadedRows:
    total = len(rows) + dropped.total()
    return LoadedRows(rows=rows, dropped=dict(dropped.most_common()), total=total)


def _prompt_and_replies(row: Mapping[str, Any], index: int) -> tuple[Conversation, list[Reply]]:
    """Return the prompt and the replies; a reply that cannot be used is replaced by the reason.

    Raises:
        UserError: The prompt is not valid; the message has the row's index.
    """
    try:
        prompt = checked_prompt(as_conversation(row["prompt"], set()))
    except RowDropped as reason:
        raise UserError(f"row {index}: {reason}") from None
    replies: list[Reply] = []
    for reply in row["replies"]:
        try:
            replies.append(split_reply_from_prompt(prompt, reply, set())[1])
        except RowDropped as reason:
            replies.append(reason)
    return prompt, replies


def _require_usable_different_replies(a: Reply, b: Reply) -> tuple[Conversation, Conversation]:
    """Return both replies. Raise RowDropped if one cannot be used, or if they are equal."""
    if isinstance(a, RowDropped):
        raise a
    if isinstance(b, RowDropped):
        raise b
    if a == b:
        raise RowDropped("equal replies")
    return a, b


def _num_characters(reply: Conversation) -> int:
    return sum(len(turn["content"]) for turn in reply)
