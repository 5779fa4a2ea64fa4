"""Scores of a reward as a differentiable function of the input embeddings of its models."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.common.conversation import Conversation
from rlhf.errors import UserError
from rlhf.explain.encoding import EncodedConversation, encode_with_parts
from rlhf.reward_models.core import CombinedReward, MappedReward, Reward, Unscorable
from rlhf.reward_models.cost import CostModel
from rlhf.reward_models.ensemble import Ensemble, HeadEnsemble, ScoreCombination
from rlhf.reward_models.learned import LearnedReward


class DifferentiableReward:
    """The score of a reward as a function of the input embeddings of its models.

    Learned reward models, text classifiers, cost models and ensembles are supported, and weighted
    sums, products, clipped values and normalized values of these. Rewards without a model, such as
    rules, have no gradient; the function treats their scores as constants.

    The embeddings are the inputs of the model after the embedding table. The table itself is not
    differentiated, so that tied output weights do not contribute.

    Args:
        reward: The reward.

    Raises:
        UserError: The reward has no differentiable model, or its models are of a kind whose score
            is not a function of one text.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.models: tuple[LearnedReward, ...] = reward.learned_rewards()
        if not self.models:
            raise UserError(
                f"reward {reward.name!r} has no model whose score can be attributed to tokens; "
                "set attribution.methods to [shapley]"
            )
        self._constants = _check_and_list_parts_without_models(reward)

    def encode(
        self, conversation: Conversation, *, num_prompt_messages: int
    ) -> EncodedConversation:
        """Return the tokens of a conversation, which must be equal for all models.

        Raises:
            Unscorable: The conversation cannot be rendered, or has no tokens.
            UserError: The models encode the conversation differently, or a tokenizer does not
                return the characters of its tokens.
        """
        first, *others = (
            encode_with_parts(model, conversation, num_prompt_messages=num_prompt_messages)
            for model in self.models
        )
        if any(other.ids != first.ids for other in others):
            raise UserError(
                f"the models of reward {self.reward.name!r} encode texts differently, so they have "
                "no common tokens to attribute the score to; explain each model alone"
            )
        return first

    def scores_without_models(self, conversation: Conversation) -> dict[int, float]:
        """Return the scores of the parts of the reward that have no model, by object id.

        Raises:
            Unscorable: One of these parts has no score.
        """
        scores = {}
        for leaf in self._constants:
            result = leaf.score([conversation])
            if result.values[0] is None:
                raise Unscorable(result.reasons[0] or "no score")
            scores[id(leaf)] = result.values[0]
        return scores

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> list[Tensor]:
        """Return the input embeddings of a text for each model, each [T, D]."""
        return [
            model.model.get_input_embeddings()(torch.tensor(list(ids), device=model.model.device))
            for model in self.models
        ]

    def scores_of_embeddings(
        self, inputs: Sequence[Tensor], constants: Mapping[int, float]
    ) -> Tensor:
        """Return the scores [B] of B texts of equal length, with gradients.

        Args:
            inputs: Input embeddings for each model, each [B, T, D].
            constants: Result of `scores_without_models`.

        Raises:
            UserError: A model accepts only token ids, such as the classifiers of BART.
        """
        logits = {}
        for model, embeddings in zip(self.models, inputs, strict=True):
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
            try:
                logits[id(model)] = model.logits(mask, inputs_embeds=embeddings)
            except NotImplementedError as error:
                raise UserError(
                    f"reward {self.reward.name!r}: {type(model.model).__name__} does not accept "
                    "embeddings; set attribution.methods to [shapley]"
                ) from error
        return _scores_from_logits(self.reward, logits, constants)

    def scores_of_ids(
        self, texts: Sequence[Sequence[int]], constants: Mapping[int, float]
    ) -> list[float]:
        """Return the scores [N] of N tokenized texts, without gradients."""
        logits = {id(model): model.logits_of_token_ids(texts) for model in self.models}
        return _scores_from_logits(self.reward, logits, constants).tolist()


def _check_and_list_parts_without_models(reward: Reward) -> list[Reward]:
    """Return the parts of a reward that have no model, and check that the others are supported.

    Raises:
        UserError: A part of the reward is not supported.
    """
    if not reward.learned_rewards():
        return [reward]
    if isinstance(reward, LearnedReward | HeadEnsemble):
        return []
    if isinstance(reward, CostModel | Ensemble | MappedReward | CombinedReward):
        return [
            leaf
            for inner in reward.inner_rewards
            for leaf in _check_and_list_parts_without_models(inner)
        ]
    raise UserError(
        f"reward {reward.name!r} ({type(reward).__name__}) is not a differentiable function of one "
        "text; set attribution.methods to [shapley]"
    )


def _scores_from_logits(
    reward: Reward, logits: Mapping[int, Tensor], constants: Mapping[int, float]
) -> Tensor:
    """Return the scores [B] of a reward.

    Args:
        reward: A reward, or one of its parts.
        logits: Object id of a model of the reward -> its logits [B, K].
        constants: Object id of a part without a model -> its score.
    """
    if id(reward) in constants:
        first = next(iter(logits.values()))
        return first.new_full((len(first),), constants[id(reward)])
    if isinstance(reward, LearnedReward):
        return reward.scores_from_logits(logits[id(reward)])
    if isinstance(reward, HeadEnsemble):
        heads = logits[id(reward.inner)][:, list(reward.inner.parts.values())]
        return _combined_scores(reward.combine, heads)
    inner = [_scores_from_logits(part, logits, constants) for part in reward.inner_rewards]
    if isinstance(reward, Ensemble):
        return _combined_scores(reward.combine, torch.stack(inner, 1))
    if isinstance(reward, MappedReward):
        return torch.stack([torch.as_tensor(reward.function(v)) for v in inner[0]])  # type: ignore[arg-type]
    if isinstance(reward, CombinedReward):
        return functools.reduce(operator.add if reward.operator == "+" else operator.mul, inner)
    return inner[0]  # a cost model


def _combined_scores(combination: ScoreCombination, scores: Tensor) -> Tensor:
    """Return the combined scores [B] of M members, [B, M], as `ScoreCombination` does."""
    if combination.how == "worst":
        return scores.amin(1)
    mean = scores.mean(1)
    if combination.how == "uncertainty":
        return mean - combination.penalty * scores.var(1, correction=0)
    return mean
