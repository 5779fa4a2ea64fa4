"""Find the training pairs that a reward model represents most like a given pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.reward_models.checkpoint import output_layer
from rlhf.reward_models.core import Unscorable
from rlhf.reward_models.learned import LearnedReward
from rlhf.reward_models.pairs import Pair


@dataclass(frozen=True)
class Neighbor:
    """A training pair that is similar to a pair."""

    index: int
    """Index of the pair in the training data."""
    similarity: float
    """Cosine of the two differences of hidden states, in [-1, 1]."""
    margin: float
    """Margin of the training pair."""
    prompt: str
    """Text of the last message of its prompt."""
    chosen: str
    """Text of its chosen reply."""
    rejected: str
    """Text of its rejected reply."""


class TrainingPairIndex:
    """Training pairs with the hidden states that the head of a reward model reads.

    A pair is represented by the difference of the states of the chosen and the rejected text, whose
    product with the weights of a linear head is the margin. Pairs with similar differences are
    therefore judged for similar reasons. Swapping the replies of a pair negates its difference.

    Args:
        model: The reward model.
        pairs: Training pairs. Pairs that cannot be scored are omitted.

    Raises:
        UserError: No pair can be scored.
    """

    def __init__(self, model: LearnedReward, pairs: Sequence[Pair]) -> None:
        self.model, self.pairs = model, list(pairs)
        differences, margins, self.indices = _pair_differences(model, self.pairs)
        if not self.indices:
            raise UserError("train_pairs: the reward can score none of the pairs")
        self.margins = margins
        self._directions = nn.functional.normalize(differences, dim=1)

    def nearest(self, pair: Pair, count: int) -> list[Neighbor]:
        """Return the most similar training pairs, the most similar first.

        The result is empty if the pair cannot be scored.
        """
        difference, _, known = _pair_differences(self.model, [pair])
        if not known:
            return []
        cosines = self._directions @ nn.functional.normalize(difference, dim=1)[0]
        top = cosines.topk(min(count, len(cosines)))
        return [
            self._neighbor(row, similarity)
            for row, similarity in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _neighbor(self, row: int, similarity: float) -> Neighbor:
        index = self.indices[row]
        pair = self.pairs[index]
        prompt, chosen, rejected = (
            str(messages[-1].get("content") or "")
            for messages in (pair.prompt, pair.chosen, pair.rejected)
        )
        return Neighbor(index, similarity, self.margins[row], prompt, chosen, rejected)


def _pair_differences(
    model: LearnedReward, pairs: Sequence[Pair]
) -> tuple[Tensor, list[float], list[int]]:
    """Return the differences of hidden states [N, D], margins [N] and indices of scorable pairs."""
    encoded, indices = [], []
    for index, pair in enumerate(pairs):
        try:
            encoded.append((model.encode(pair.chosen), model.encode(pair.rejected)))
        except Unscorable:
            continue
        indices.append(index)
    if not encoded:
        return torch.zeros(0, 1), [], []
    states, logits = head_inputs(model, [ids for pair in encoded for ids in pair])
    scores = model.scores_from_logits(logits).view(-1, 2)
    differences = states.view(len(encoded), 2, -1)
    margins = (scores[:, 0] - scores[:, 1]).tolist()
    return differences[:, 0] - differences[:, 1], margins, indices


@torch.no_grad()
def head_inputs(model: LearnedReward, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the hidden states that the last layer of the head reads, [N, D], and logits [N, K]."""
    found: list[Tensor] = []
    layer = output_layer(model.model)
    if layer is None:
        raise UserError("train_pairs: this reward model has no linear output layer")
    hook = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    logits = []
    try:
        for batch in _batches(texts, model.batch_size):
            mask, ids = model.pad_to_mask_and_ids(batch)
            logits.append(model.logits(mask, input_ids=ids).cpu())
    finally:
        hook.remove()
    return torch.cat(found).float().cpu(), torch.cat(logits)


def _batches(texts: Sequence[Sequence[int]], size: int) -> Iterator[Sequence[Sequence[int]]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]
