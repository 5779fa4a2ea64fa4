"""Find few words whose deletion flips the verdict of a reward on a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.explain.words import Word, without_words
from rlhf.reward_models.core import Reward
from rlhf.reward_models.pairs import Pair


@dataclass(frozen=True)
class Counterfactual:
    """Words whose deletion changes the sign of the margin, or moves the margin toward 0."""

    words: list[Word]
    """The deleted words, in the order in which they were found."""
    margin: float
    """Margin after the deletion."""
    flips: bool
    """Whether the margin has the opposite sign."""
    evaluations: int
    """Number of pairs that were scored."""


def find_counterfactual(
    reward: Reward,
    pair: Pair,
    margin: float,
    candidates: Sequence[Word],
    *,
    max_words: int = 6,
    max_candidates: int = 16,
) -> Counterfactual | None:
    """Delete words greedily until the margin changes its sign.

    In each round, the deletion of each candidate is scored, and the best one is kept. After the
    sign has changed, each deleted word except the last is restored, one after another, if the sign
    does not change back. The result is not always the smallest set of words that changes the sign.

    Args:
        reward: The reward.
        pair: The pair.
        margin: Margin of the pair.
        candidates: Words of both replies (side "chosen" or "rejected"), the most promising first.
        max_words: Maximum number of deleted words.
        max_candidates: Maximum number of words that are tried.

    Returns:
        The best deletion that was found. None if there are no candidates, the margin is 0, or no
        deletion of one word moves the margin toward the other sign.
    """
    remaining = list(candidates[:max_candidates])
    if not remaining or margin == 0:
        return None
    sign = 1.0 if margin > 0 else -1.0
    deleted: list[Word] = []
    best, evaluations = margin, 0
    while remaining and len(deleted) < max_words and sign * best >= 0:
        margins = margins_after_deletions(reward, pair, [[*deleted, word] for word in remaining])
        evaluations += len(remaining)
        scored = [(sign * m, i) for i, m in enumerate(margins) if m is not None]
        if not scored or min(scored)[0] >= sign * best:
            break  # no deletion brings the margin closer to the other sign
        value, index = min(scored)
        best = sign * value
        deleted.append(remaining.pop(index))
    if sign * best < 0 and len(deleted) > 1:
        deleted, best, more = _restore_needless_deletions(reward, pair, deleted, best, sign)
        evaluations += more
    return Counterfactual(deleted, best, sign * best < 0, evaluations) if deleted else None


def _restore_needless_deletions(
    reward: Reward, pair: Pair, deleted: list[Word], margin: float, sign: float
) -> tuple[list[Word], float, int]:
    """Restore each deleted word except the last one, if the margin then keeps its new sign.

    Returns:
        The words that remain deleted, the margin, and the number of scored pairs.
    """
    evaluations = 0
    for word in list(deleted[:-1]):
        still_deleted = [other for other in deleted if other != word]
        (without,) = margins_after_deletions(reward, pair, [still_deleted])
        evaluations += 1
        if without is not None and sign * without < 0:
            deleted, margin = still_deleted, without
    return deleted, margin, evaluations


def margins_after_deletions(
    reward: Reward, pair: Pair, deletions: Sequence[Sequence[Word]]
) -> list[float | None]:
    """Return the margin of a pair after each of N deletions, [N]; None if it cannot be scored."""

    def of_side(side: str) -> list[frozenset[Word]]:
        return [frozenset(w for w in words if w.side == side) for words in deletions]

    conversations = {"chosen": pair.chosen, "rejected": pair.rejected}
    # Most deletions change only one of the two texts, so each distinct text is scored once.
    texts = list(dict.fromkeys((side, words) for side in conversations for words in of_side(side)))
    shortened = [without_words(conversations[side], words) for side, words in texts]
    scores = dict(zip(texts, reward.score(shortened).values, strict=True))
    pairs = [
        (scores["chosen", chosen], scores["rejected", rejected])
        for chosen, rejected in zip(of_side("chosen"), of_side("rejected"), strict=True)
    ]
    return [None if a is None or b is None else a - b for a, b in pairs]
