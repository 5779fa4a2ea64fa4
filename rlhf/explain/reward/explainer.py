"""Explain the scores of a reward on preference pairs or on single texts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlhf.common.conversation import Conversation
from rlhf.config.explain import AttributionMethod, AttributionSpec
from rlhf.errors import UserError
from rlhf.explain.counterfactuals import Counterfactual, find_counterfactual
from rlhf.explain.faithfulness import Faithfulness, measure_faithfulness
from rlhf.explain.neighbors import TrainingPairIndex
from rlhf.explain.prompt_influence import prompt_influence
from rlhf.explain.reward.explanation import PairExplanation, RewardExplanation, Side
from rlhf.explain.shapley import WordAttributor
from rlhf.explain.token_attribution import TokenAttributor
from rlhf.explain.words import Word
from rlhf.reward_models.core import Reward, Unscorable
from rlhf.reward_models.pairs import Pair

log = logging.getLogger(__name__)


class RewardExplainer:
    """Explains the scores of a reward.

    Args:
        reward: The reward. See `DifferentiableReward` for the kinds whose scores can be attributed
            to tokens. The method "shapley" supports every kind.
        options: Attribution methods, and the other explanations of each pair.
        train_pairs: Training pairs of the reward, in which the nearest pairs are searched.
        seed: Seed of the random orders of Shapley values and of the random deletions.

    Raises:
        UserError: The reward cannot be differentiated, captum is not installed, or `train_pairs`
            cannot be used (see `TrainingPairIndex`).
    """

    def __init__(
        self,
        reward: Reward,
        options: AttributionSpec | None = None,
        *,
        train_pairs: Sequence[Pair] = (),
        seed: int = 0,
    ) -> None:
        self.reward, self.options, self.seed = reward, options or AttributionSpec(), seed
        self.attributor = (
            WordAttributor(reward, self.options, seed=seed)
            if self.options.methods == ["shapley"]
            else TokenAttributor(reward, self.options)
        )
        self.index = TrainingPairIndex(reward, train_pairs) if train_pairs else None

    def explain_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        shown: int | None = None,
        measure_on: int = 0,
        draws: int = 4,
    ) -> RewardExplanation:
        """Explain preference pairs.

        Args:
            pairs: The pairs. All of them are scored, for the standard deviation of the margins.
            shown: Maximum number of pairs that are explained, starting with the first pair that can
                be scored; by default all.
            measure_on: Maximum number of pairs, starting with the first that can be scored, on
                which the faithfulness of the methods is measured. The faithfulness of Shapley
                values is not measured.
            draws: Number of random deletions of each pair for each deleted fraction.

        Raises:
            UserError: No pair can be scored, or the models of the reward do not support
                attributions to tokens, see `DifferentiableReward`.
        """
        scorable, margins, skipped = _scorable_pairs(self.reward, pairs)
        if not scorable:
            reasons = ", ".join(skipped) or "there are no pairs"
            raise UserError(f"explain: the reward can score none of the pairs: {reasons}")
        std = float(np.std(margins, ddof=1)) if len(margins) > 1 else None
        prompts = {pair.prompt_json: pair.prompt for pair in scorable}
        explained = []
        for index, pair in enumerate(scorable[:shown]):
            others = [prompt for key, prompt in prompts.items() if key != pair.prompt_json]
            try:
                explained.append(self._explain_pair(pair, margins[index], std or 0.0, others))
            except Unscorable as reason:
                skipped[str(reason)] += 1
            log.info("explained pair %d of %d", index + 1, len(scorable[:shown]))
        faithfulness = [
            result
            for method in self.options.methods
            if (
                result := self._measure_faithfulness(
                    scorable[:measure_on], method, std or 1.0, draws
                )
            )
        ]
        result = RewardExplanation(
            self.reward.name,
            explained,
            margin_std=std,
            faithfulness=faithfulness,
            skipped=dict(skipped),
        )
        self._warn_of_large_gap(result.largest_relative_completeness_gap)
        return result

    def explain_texts(self, conversations: Sequence[Conversation]) -> RewardExplanation:
        """Explain the scores of single texts, for example of a text classifier.

        The messages before the last one are the prompt. The tolerance of integrated gradients is
        relative to the larger of |score| and the standard deviation of the scores.

        Raises:
            UserError: No text can be scored, or the models of the reward do not support
                attributions to tokens, see `DifferentiableReward`.
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
            try:
                text, _ = self.attributor.explain(
                    conversation,
                    num_prompt_messages=len(conversation) - 1,
                    side="text",
                    scale=max(abs(value), std) or 1.0,
                )
                texts.append(text)
            except Unscorable as error:
                skipped[str(error)] += 1
        if not texts:
            raise UserError(
                f"explain: the reward can score none of the texts: {', '.join(skipped)}"
            )
        return RewardExplanation(self.reward.name, texts=texts, skipped=dict(skipped))

    def _warn_of_large_gap(self, gap: float | None) -> None:
        """Log a warning if integrated gradients did not reach the tolerance."""
        if gap is None or gap <= self.options.tolerance:
            return
        log.warning(
            "integrated gradients: the completeness gap is up to %.2g%%, which exceeds "
            "attribution.tolerance (%g%%): increase attribution.max_steps, and load the models "
            "with dtype: float32",
            100 * gap,
            100 * self.options.tolerance,
        )

    def _explain_pair(
        self, pair: Pair, margin: float, std: float, other_prompts: Sequence[Conversation]
    ) -> PairExplanation:
        """Explain a pair, given its margin and the standard deviation of all margins.

        Raises:
            Unscorable: A text that the explanation needs has no score.
        """
        # Each of the two texts may have half of the accepted completeness gap. All margins can be
        # 0, for example if the replies are equal.
        scale = (max(abs(margin), std) or 1.0) / 2
        sides = [
            self.attributor.explain(
                conversation, num_prompt_messages=len(pair.prompt), side=side, scale=scale
            )
            for side, conversation in _sides(pair)
        ]
        explanation = PairExplanation(sides[0][0], sides[1][0], margin)
        words = [item for _, attributed in sides for item in attributed]
        influence = None
        if self.options.other_prompts:
            prompts = other_prompts[: self.options.other_prompts]
            share = prompt_share(explanation, self.options.methods[-1])
            influence = prompt_influence(self.reward, pair, prompts, share=share)
        return replace(
            explanation,
            prompt_influence=influence,
            counterfactual=self._counterfactual(pair, margin, words),
            neighbors=self.index.nearest(pair, self.options.neighbors) if self.index else [],
        )

    def _counterfactual(
        self, pair: Pair, margin: float, words: Sequence[tuple[Word, float]]
    ) -> Counterfactual | None:
        """Search for a counterfactual edit, first of the words that support the margin most.

        The result is None if the search is disabled or finds no edit.
        """
        if not self.options.counterfactual_words:
            return None
        sign = 1.0 if margin > 0 else -1.0
        candidates = sorted(words, key=lambda item: -sign * item[1])
        return find_counterfactual(
            self.reward,
            pair,
            margin,
            [word for word, _ in candidates],
            max_words=self.options.counterfactual_words,
        )

    def _measure_faithfulness(
        self, pairs: Sequence[Pair], method: AttributionMethod, scale: float, draws: int
    ) -> Faithfulness | None:
        """Measure the faithfulness of a method on the pairs whose tokens can be deleted.

        No reply may be empty, and one of the two must have several tokens, because each reply keeps
        at least one token. The result is None if there are no such pairs.
        """
        if not isinstance(self.attributor, TokenAttributor):
            return None
        texts, clusters = [], []
        for pair in pairs:
            chosen, rejected = (
                self.attributor.attributed_text_for_deletion(
                    conversation,
                    num_prompt_messages=len(pair.prompt),
                    side=side,
                    method=method,
                    scale=scale,
                )
                for side, conversation in _sides(pair)
            )
            lengths = [len(chosen.deletable), len(rejected.deletable)]
            if min(lengths) > 0 and max(lengths) > 1:
                texts.append((chosen, rejected))
                clusters.append(pair.prompt_json)
        if not texts:
            return None
        reward, seed = self.attributor.reward, self.seed
        return measure_faithfulness(reward, texts, clusters, method=method, draws=draws, seed=seed)


def _sides(pair: Pair) -> list[tuple[Side, Conversation]]:
    return [("chosen", pair.chosen), ("rejected", pair.rejected)]


def prompt_share(explanation: PairExplanation, method: str) -> float | None:
    """Return the share of the prompt in the absolute attributions to the prompt and the replies.

    The result is None if all attributions to the prompt are 0, as for Shapley values.
    """
    sums = {"template": 0.0, "prompt": 0.0, "reply": 0.0}
    for text in (explanation.chosen, explanation.rejected):
        for part, value in zip(text.parts, text.attributions[method], strict=True):
            sums[part] += abs(value)
    prompt, reply = sums["prompt"], sums["reply"]
    return prompt / (prompt + reply) if prompt else None


def _scorable_pairs(
    reward: Reward, pairs: Sequence[Pair]
) -> tuple[list[Pair], list[float], Counter[str]]:
    """Return the pairs with two scores, their margins, and reason -> number of the other pairs."""
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
