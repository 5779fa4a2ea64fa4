"""Find the training pairs whose representations are most similar to that of a given pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.explain.margins import margins
from rlhf.reward_models.checkpoint import output_layer
from rlhf.reward_models.core import Reward
from rlhf.reward_models.learned import LearnedReward
from rlhf.reward_models.pairs import Pair


@dataclass(frozen=True)
class Neighbor:
    """A training pair that is similar to a given pair."""

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

    A pair is represented by the difference of the states of the chosen and the rejected text. The
    product of this difference with the weights of a linear head is the margin. A high similarity
    therefore means that the same features contribute to the margins of both pairs. Swapping the
    replies of a pair negates its difference.

    Args:
        reward: The reward. The hidden states are those of its first model.
        pairs: Training pairs. Pairs that cannot be scored are omitted.

    Raises:
        UserError: The reward has no model, its first model has no linear output layer, or no pair
            can be scored.
    """

    def __init__(self, reward: Reward, pairs: Sequence[Pair]) -> None:
        models: tuple[LearnedReward, ...] = reward.learned_rewards()
        if not models:
            raise UserError("train_pairs needs a reward with a model; remove train_pairs")
        self.model, self.pairs = models[0], list(pairs)
        all_margins = margins(reward, [(pair.chosen, pair.rejected) for pair in pairs])
        self.margins = {i: margin for i, margin in enumerate(all_margins) if margin is not None}
        """Index of a pair that can be scored -> its margin."""
        if not self.margins:
            raise UserError("train_pairs: the reward can score none of the pairs")
        self._indices = list(self.margins)
        differences = _hidden_state_differences(self.model, [self.pairs[i] for i in self._indices])
        self._directions = nn.functional.normalize(differences, dim=1)

    def nearest(self, pair: Pair, count: int) -> list[Neighbor]:
        """Return up to `count` training pairs that are most similar to a pair, in this order."""
        direction = nn.functional.normalize(_hidden_state_differences(self.model, [pair]), dim=1)[0]
        cosines = self._directions @ direction
        top = cosines.topk(min(count, len(cosines)))
        return [
            self._neighbor(self._indices[row], similarity)
            for row, similarity in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _neighbor(self, index: int, similarity: float) -> Neighbor:
        pair = self.pairs[index]
        prompt, chosen, rejected = (
            str(messages[-1].get("content") or "")
            for messages in (pair.prompt, pair.chosen, pair.rejected)
        )
        return Neighbor(index, similarity, self.margins[index], prompt, chosen, rejected)


def _hidden_state_differences(model: LearnedReward, pairs: Sequence[Pair]) -> Tensor:
    """Return the differences of the hidden states of the chosen and the rejected texts, [N, D]."""
    texts = [model.encode(text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    states = head_inputs(model, texts).view(len(pairs), 2, -1)
    return states[:, 0] - states[:, 1]


@torch.no_grad()
def head_inputs(model: LearnedReward, token_ids: Sequence[Sequence[int]]) -> Tensor:
    """Return the hidden states of N tokenized texts that the head reads, [N, D].

    Raises:
        UserError: The model has no linear output layer.
    """
    batch_states: list[Tensor] = []
    layer = output_layer(model.model)
    if layer is None:
        raise UserError("train_pairs: this reward model has no linear output layer")
    hook = layer.register_forward_pre_hook(lambda _, inputs: batch_states.append(inputs[0]))
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]), reverse=True)
    try:
        for start in range(0, len(order), model.batch_size):
            batch = [token_ids[i] for i in order[start : start + model.batch_size]]
            mask, ids = model.pad_to_mask_and_ids(batch)
            model.logits(mask, input_ids=ids)
    finally:
        hook.remove()
    states = torch.cat(batch_states).float().cpu()
    return states[torch.tensor(order).argsort()]
