"""Explain one text of any reward by sampled Shapley values of its words."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from rlhf.common.conversation import Conversation
from rlhf.common.imports import check_extra_installed
from rlhf.config.explain import AttributionSpec
from rlhf.explain.encoding import Part
from rlhf.explain.reward.explanation import Side, TextExplanation
from rlhf.explain.token_attribution import SIGNS
from rlhf.explain.words import Word, without_words, words_of_last_message
from rlhf.reward_models.core import Reward, Unscorable, content_text

_BATCH = 16
"""Number of texts that are scored in one call."""


class WordAttributor:
    """Explains texts by scores only, so that rules, judges and pairwise models are supported.

    The attribution of a word is its Shapley value: the mean change of the score when the word is
    added to the words before it in a random order of all words (Castro et al. 2009). The
    attributions sum to the score of the text minus the score of the text without the words of its
    last message.

    Args:
        reward: Any reward.
        spec: ``orders`` is the number of random orders, each of which needs one score per word.
        seed: Seed of the orders.

    Raises:
        UserError: captum is not installed.
    """

    def __init__(self, reward: Reward, spec: AttributionSpec, *, seed: int = 0) -> None:
        check_extra_installed("the method shapley", "explain", "captum")
        from captum.attr import ShapleyValueSampling

        self.reward, self.spec, self.seed = reward, spec, seed
        self._sampling = ShapleyValueSampling

    def explain(
        self, conversation: Conversation, *, num_prompt_messages: int, side: Side, scale: float
    ) -> tuple[TextExplanation, list[tuple[Word, float]]]:
        """Explain a text; the arguments and the result are those of `TokenAttributor.explain`.

        The tokens of the explanation are the messages of the prompt, whose attribution is 0, and
        the words of the last message with the white space before them. ``scale`` has no effect.

        Raises:
            Unscorable: A text with some of the words has no score.
        """
        words = words_of_last_message(conversation, side)
        values = [SIGNS[side] * value for value in self.shapley_values(conversation, words)]
        (score,) = self._scores([conversation])
        contents = [content_text(message.get("content")) for message in conversation]
        prompt = [f"{content}\n" for content in contents[:num_prompt_messages]]
        reply = re.findall(r"\s*\S+", contents[-1])
        of_prompt, of_reply = list[Part](["prompt"]), list[Part](["reply"])
        explanation = TextExplanation(
            tokens=[*prompt, *reply],
            parts=of_prompt * len(prompt) + of_reply * len(reply),
            score=score,
            attributions={"shapley": [*([0.0] * len(prompt)), *values]},
        )
        return explanation, list(zip(words, values, strict=True))

    def shapley_values(self, conversation: Conversation, words: list[Word]) -> list[float]:
        """Return the Shapley value of each word for the score of a text, [W].

        Raises:
            Unscorable: The text without some of the words has no score.
        """
        if not words:
            return []

        def scores_of(masks: Tensor) -> Tensor:
            """Return the scores [B] of texts with the words whose mask [B, W] is 1."""
            removed = [[words[i] for i in (row == 0).nonzero()[:, 0].tolist()] for row in masks]
            scores = self._scores([without_words(conversation, row) for row in removed])
            return torch.tensor(scores, dtype=torch.float64)

        present = torch.ones(1, len(words), dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            values = self._sampling(scores_of).attribute(
                present, n_samples=self.spec.orders, perturbations_per_eval=_BATCH
            )
        return values[0].tolist()

    def _scores(self, conversations: list[Conversation]) -> list[float]:
        """Return the scores of N texts; raise Unscorable if one of them has no score."""
        result = self.reward.score(conversations)
        known = [value for value in result.values if value is not None]
        if len(known) < len(conversations):
            raise Unscorable(next(filter(None, result.reasons), "no score"))
        return known
