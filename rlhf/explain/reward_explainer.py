"""Explain the scores of a reward on preference pairs or on single texts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from rlhf.common.conversation import Conversation
from rlhf.config.explain import AttributionMethod, AttributionSpec
from rlhf.errors import UserError
from rlhf.explain.attribution import Attribution, gradient_times_input, integrated_gradients
from rlhf.explain.counterfactuals import Counterfactual, find_counterfactual
from rlhf.explain.encoding import EncodedConversation
from rlhf.explain.faithfulness import AttributedText, Faithfulness, measure_faithfulness
from rlhf.explain.neighbors import TrainingPairIndex
from rlhf.explain.prefix_curve import prefix_curve
from rlhf.explain.prompt_influence import prompt_influence
from rlhf.explain.reward_explanation import PairExplanation, RewardExplanation, TextExplanation
from rlhf.explain.score_function import ScoreFunction
from rlhf.explain.words import word_attributions, words_of
from rlhf.reward_models.core import Reward
from rlhf.reward_models.pairs import Pair

log = logging.getLogger(__name__)


class RewardExplainer:
    """Explains the scores of a reward.

    Args:
        reward: The reward; see `ScoreFunction` for the supported kinds.
        options: Attribution methods, and what else is computed for each pair.
        train_pairs: Training pairs of the reward, among which the nearest ones are searched.

    Raises:
        UserError: The reward cannot be differentiated.
    """

    def __init__(
        self,
        reward: Reward,
        options: AttributionSpec | None = None,
        *,
        train_pairs: Sequence[Pair] = (),
    ) -> None:
        self.reward, self.options = reward, options or AttributionSpec()
        self.score = ScoreFunction(reward)
        self.index = TrainingPairIndex(reward, train_pairs) if train_pairs else None

    def explain_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        shown: int | None = None,
        measure_on: int = 0,
        draws: int = 4,
        seed: int = 0,
    ) -> RewardExplanation:
        """Explain preference pairs.

        Args:
            pairs: The pairs. All of them are scored, for the standard deviation of the margins.
            shown: Number of pairs that are explained, from the first one; by default all.
            measure_on: Number of pairs, from the first one, on which the faithfulness of the
                methods is measured.
            draws: Number of random deletions of each pair.
            seed: Seed of the random deletions.

        Raises:
            UserError: No pair can be scored.
        """
        scorable, margins, skipped = _scorable_pairs(self.reward, pairs)
        if not scorable:
            reasons = ", ".join(skipped) or "there are no pairs"
            raise UserError(f"explain: the reward can score none of the pairs: {reasons}")
        std = float(np.std(margins, ddof=1)) if len(margins) > 1 else None
        explained = []
        for index, pair in enumerate(scorable[:shown]):
            others = [p.prompt for p in scorable if p.prompt != pair.prompt]
            explained.append(self._explain_pair(pair, margins[index], std or 0.0, others))
            log.info("explained pair %d of %d", index + 1, len(scorable[:shown]))
        faithfulness = [
            result
            for method in self.options.methods
            if (result := self._measure(scorable[:measure_on], method, std or 1.0, draws, seed))
        ]
        return RewardExplanation(
            self.reward.name,
            explained,
            margin_std=std,
            faithfulness=faithfulness,
            skipped=dict(skipped),
        )

    def explain_texts(self, conversations: Sequence[Conversation]) -> RewardExplanation:
        """Explain the scores of single texts, for example of a text classifier.

        The messages before the last one are the prompt. The tolerance of integrated gradients is
        relative to the larger of |score| and the standard deviation of the scores.
        """
        scores = self.reward.score(conversations)
        values = scores.values
        known = [value for value in values if value is not None]
        std = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
        texts, skipped = [], Counter[str]()
        for conversation, value, reason in zip(conversations, values, scores.reasons, strict=True):
            if value is None:
                skipped[reason or "no score"] += 1
                continue
            encoded, constants = self._encode(conversation, len(conversation) - 1)
            scale = max(abs(value), std)
            texts.append(self._explain_text(encoded, constants, sign=1.0, scale=scale))
        if not texts:
            raise UserError(
                f"explain: the reward can score none of the texts: {', '.join(skipped)}"
            )
        return RewardExplanation(self.reward.name, texts=texts, skipped=dict(skipped))

    def attribute(
        self, encoded: EncodedConversation, constants: dict[int, float], method: str, scale: float
    ) -> Attribution:
        """Attribute the score of a text to its tokens.

        Args:
            encoded: The text.
            constants: Result of `ScoreFunction.constants`.
            method: Attribution method.
            scale: Score to which the tolerance of integrated gradients is relative.
        """
        inputs = self.score.embed(encoded.ids)

        def score(batch: Sequence[Tensor]) -> Tensor:
            return self.score.scores_of_embeddings(batch, constants)

        if method == "gradient_x_input":
            return gradient_times_input(score, inputs)
        options = self.options
        tolerance = options.tolerance * scale
        return integrated_gradients(score, inputs, tolerance=tolerance, max_steps=options.max_steps)

    def _encode(
        self, conversation: Conversation, num_prompt_messages: int
    ) -> tuple[EncodedConversation, dict[int, float]]:
        encoded = self.score.encode(conversation, num_prompt_messages=num_prompt_messages)
        return encoded, self.score.constants(conversation)

    def _explain_text(
        self,
        encoded: EncodedConversation,
        constants: dict[int, float],
        *,
        sign: float,
        scale: float,
    ) -> TextExplanation:
        """Explain one text; the tolerance of integrated gradients is relative to `scale`."""
        found = {
            method: self.attribute(encoded, constants, method, scale)
            for method in self.options.methods
        }
        paths = found.get("integrated_gradients")
        points = self.options.prefix_points
        return TextExplanation(
            tokens=encoded.tokens,
            parts=encoded.parts,
            score=next(iter(found.values())).score,
            attributions={
                method: [sign * value for value in result.values]
                for method, result in found.items()
            },
            reference_score=paths.reference_score if paths else None,
            gap=paths.gap if paths else None,
            steps=paths.steps if paths else None,
            prefixes=prefix_curve(self.score, encoded, constants, max_points=points)
            if points
            else None,
        )

    def _explain_pair(
        self, pair: Pair, margin: float, std: float, other_prompts: Sequence[Conversation]
    ) -> PairExplanation:
        scale = max(abs(margin), std) / 2  # each of the two texts may have half of the gap
        sides = [
            (encoded, self._explain_text(encoded, constants, sign=sign, scale=scale))
            for sign, (encoded, constants) in zip((1.0, -1.0), self._encode_pair(pair), strict=True)
        ]
        explanation = PairExplanation(sides[0][1], sides[1][1], margin)
        influence = None
        if self.options.other_prompts:
            prompts = other_prompts[: self.options.other_prompts]
            share = prompt_share(explanation, self.options.methods[-1])
            influence = prompt_influence(self.reward, pair, prompts, share=share)
        return replace(
            explanation,
            prompt_influence=influence,
            counterfactual=self._counterfactual(pair, margin, sides),
            neighbors=self.index.nearest(pair, self.options.neighbors) if self.index else [],
        )

    def _encode_pair(self, pair: Pair) -> list[tuple[EncodedConversation, dict[int, float]]]:
        return [self._encode(reply, len(pair.prompt)) for reply in (pair.chosen, pair.rejected)]

    def _counterfactual(
        self,
        pair: Pair,
        margin: float,
        sides: Sequence[tuple[EncodedConversation, TextExplanation]],
    ) -> Counterfactual | None:
        """Search a counterfactual among the words that support the verdict most."""
        if not self.options.counterfactual_words:
            return None
        method = self.options.methods[-1]
        candidates = []
        for side, conversation, (encoded, explanation) in zip(
            ("chosen", "rejected"), (pair.chosen, pair.rejected), sides, strict=True
        ):
            words = words_of(conversation, side)
            values = explanation.attributions[method]
            support = word_attributions(words, conversation, encoded, values)
            candidates += list(zip(support, words, strict=True))
        sign = 1.0 if margin > 0 else -1.0
        candidates.sort(key=lambda item: -sign * item[0])
        return find_counterfactual(
            self.reward,
            pair,
            margin,
            [word for _, word in candidates],
            max_words=self.options.counterfactual_words,
        )

    def _measure(
        self, pairs: Sequence[Pair], method: AttributionMethod, scale: float, draws: int, seed: int
    ) -> Faithfulness | None:
        """Measure the faithfulness of a method on the pairs with two replies that are not empty.

        The result is None if there are no such pairs.
        """
        texts, clusters = [], []
        for pair in pairs:
            sides = []
            for sign, (encoded, constants) in zip(
                (1.0, -1.0), self._encode_pair(pair), strict=True
            ):
                result = self.attribute(encoded, constants, method, scale)
                values = [sign * value for value in result.values]
                sides.append(
                    AttributedText(encoded.ids, encoded.positions("reply"), values, constants)
                )
            if all(side.deletable for side in sides):
                texts.append((sides[0], sides[1]))
                clusters.append(pair.prompt_json)
        if not texts:
            return None
        return measure_faithfulness(
            self.score, texts, clusters, method=method, draws=draws, seed=seed
        )


def prompt_share(explanation: PairExplanation, method: str) -> float | None:
    """Return the share of the prompt in the absolute attributions to the prompt and the replies."""
    sums = {"template": 0.0, "prompt": 0.0, "reply": 0.0}
    for text in (explanation.chosen, explanation.rejected):
        for part, value in zip(text.parts, text.attributions[method], strict=True):
            sums[part] += abs(value)
    total = sums["prompt"] + sums["reply"]
    return sums["prompt"] / total if total else None


def _scorable_pairs(
    reward: Reward, pairs: Sequence[Pair]
) -> tuple[list[Pair], list[float], Counter[str]]:
    """Return the pairs whose texts have scores, their margins, and the reasons of the others."""
    scores = reward.score([text for pair in pairs for text in (pair.chosen, pair.rejected)])
    scorable, margins, skipped = [], [], Counter[str]()
    for i, pair in enumerate(pairs):
        chosen, rejected = scores.values[2 * i : 2 * i + 2]
        if chosen is None or rejected is None:
            reasons = scores.reasons[2 * i : 2 * i + 2]
            skipped[next(filter(None, reasons), "no score")] += 1
            continue
        scorable.append(pair)
        margins.append(chosen - rejected)
    return scorable, margins, skipped
