"""Explain one text by the attributions of its score to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.common.conversation import Conversation
from rlhf.config.explain import AttributionSpec
from rlhf.explain.attribution import Attribution, gradient_times_input, integrated_gradients
from rlhf.explain.encoding import EncodedConversation
from rlhf.explain.faithfulness import AttributedText
from rlhf.explain.prefix_curve import prefix_curve
from rlhf.explain.reward.explanation import Side, TextExplanation
from rlhf.explain.score_function import DifferentiableReward
from rlhf.explain.words import Word, word_attributions, words_of_last_message
from rlhf.reward_models.core import Reward

SIGNS: dict[str, float] = {"chosen": 1.0, "rejected": -1.0, "text": 1.0}
"""Side -> factor from the attributions of a text's score to those of the margin."""


class TokenAttributor:
    """Explains texts by the gradients of their scores.

    Args:
        reward: The reward; see `DifferentiableReward` for the supported kinds.
        spec: Attribution methods and their options.

    Raises:
        UserError: The reward cannot be differentiated.
    """

    def __init__(self, reward: Reward, spec: AttributionSpec) -> None:
        self.reward, self.spec = DifferentiableReward(reward), spec

    def explain(
        self, conversation: Conversation, *, num_prompt_messages: int, side: Side, scale: float
    ) -> tuple[TextExplanation, list[tuple[Word, float]]]:
        """Explain a text.

        Args:
            conversation: The text.
            num_prompt_messages: Number of messages before the reply.
            side: Role of the text in a pair.
            scale: Score to which the tolerance of integrated gradients is relative.

        Returns:
            - The explanation.
            - The words of the last message with their attributions by the last method.

        Raises:
            Unscorable: The conversation cannot be rendered or has no tokens, or a part of the
                reward without a model has no score.
            UserError: See `DifferentiableReward.encode` and `scores_of_embeddings`.
        """
        encoded = self.reward.encode(conversation, num_prompt_messages=num_prompt_messages)
        constants = self.reward.scores_without_models(conversation)
        attributions = {m: self._attribute(encoded, constants, m, scale) for m in self.spec.methods}
        sign = SIGNS[side]
        values = {m: [sign * v + 0.0 for v in result.values] for m, result in attributions.items()}
        path, points = attributions.get("integrated_gradients"), self.spec.prefix_points
        explanation = TextExplanation(
            tokens=encoded.tokens,
            parts=encoded.parts,
            score=next(iter(attributions.values())).score,
            attributions=values,
            reference_score=path.reference_score if path else None,
            gap=path.gap if path else None,
            steps=path.steps if path else None,
            prefixes=prefix_curve(self.reward, encoded, constants, max_points=points)
            if points
            else None,
        )
        words = words_of_last_message(conversation, side)
        support = word_attributions(words, conversation, encoded, values[self.spec.methods[-1]])
        return explanation, list(zip(words, support, strict=True))

    def attributed_text_for_deletion(
        self,
        conversation: Conversation,
        *,
        num_prompt_messages: int,
        side: Side,
        method: str,
        scale: float,
    ) -> AttributedText:
        """Return a text with its attributions by one method, for the deletion test.

        The arguments are those of `explain`.
        """
        encoded = self.reward.encode(conversation, num_prompt_messages=num_prompt_messages)
        constants = self.reward.scores_without_models(conversation)
        values = self._attribute(encoded, constants, method, scale).values
        signed = [SIGNS[side] * value for value in values]
        return AttributedText(encoded.ids, encoded.positions("reply"), signed, constants)

    def _attribute(
        self,
        encoded: EncodedConversation,
        constants: Mapping[int, float],
        method: str,
        scale: float,
    ) -> Attribution:
        """Attribute the score of a text to its tokens by one method."""
        inputs = self.reward.embed(encoded.ids)

        def score(batch: Sequence[Tensor]) -> Tensor:
            return self.reward.scores_of_embeddings(batch, constants)

        if method == "gradient_x_input":
            return gradient_times_input(score, inputs)
        return integrated_gradients(
            score,
            inputs,
            _reference_embeddings(inputs, encoded.positions("template")),
            tolerance=self.spec.tolerance * scale,
            max_steps=self.spec.max_steps,
        )


def _reference_embeddings(
    inputs: Sequence[Tensor], template_positions: Sequence[int]
) -> list[Tensor]:
    """Return zero embeddings, except those of the chat template, which are unchanged, each [T, D].

    The head of a decoder reads the state of a token of the template. If the embedding of this token
    were zero, the score would depend on the reply in another way than in the text.
    """
    references = [torch.zeros_like(x) for x in inputs]
    for x, reference in zip(inputs, references, strict=True):
        reference[template_positions] = x[template_positions]
    return references
