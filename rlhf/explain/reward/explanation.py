"""The results of explaining pairs and texts by a reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.explain.counterfactuals import Counterfactual
from rlhf.explain.encoding import Part
from rlhf.explain.faithfulness import Faithfulness
from rlhf.explain.neighbors import Neighbor
from rlhf.explain.prefix_curve import PrefixCurve
from rlhf.explain.prompt_influence import PromptInfluence

Side = Literal["chosen", "rejected", "text"]
"""Role of a text: a reply of a pair, or a single text."""


@dataclass(frozen=True)
class TextExplanation:
    """The explanation of one text: a reply with its prompt, or a classified text."""

    tokens: list[str]
    """Text of each token, [T]. For Shapley values, a token is a message of the prompt or a word of
    the last message."""
    parts: list[Part]
    """Part of each token, [T]."""
    score: float
    """Score of the text."""
    attributions: dict[str, list[float]]
    """Method -> attribution to each token, [T]. In a pair, the attributions are those of the
    margin: in the rejected text, they have the opposite sign of those of its score."""
    reference_score: float | None = None
    """Score of the chat template with zero embeddings of the prompt and the reply, from which
    integrated gradients start."""
    gap: float | None = None
    """Completeness gap of integrated gradients."""
    steps: int | None = None
    """Number of gradients of integrated gradients."""
    prefixes: PrefixCurve | None = None
    """Scores of the prefixes of the reply."""


@dataclass(frozen=True)
class PairExplanation:
    """The explanation of one preference pair."""

    chosen: TextExplanation
    rejected: TextExplanation
    margin: float
    """Score of the chosen minus score of the rejected text."""
    prompt_influence: PromptInfluence | None = None
    counterfactual: Counterfactual | None = None
    neighbors: list[Neighbor] = field(default_factory=list)

    @property
    def completeness_gap(self) -> float | None:
        """Completeness gap of integrated gradients for the margin: the sum of those of the texts.

        It is an upper bound, because the errors of the two texts can cancel.
        """
        if self.chosen.gap is None or self.rejected.gap is None:
            return None
        return self.chosen.gap + self.rejected.gap


@dataclass(frozen=True)
class RewardExplanation:
    """The explanations of pairs and texts by one reward."""

    reward: str
    """Name of the reward."""
    pairs: list[PairExplanation] = field(default_factory=list)
    texts: list[TextExplanation] = field(default_factory=list)
    margin_std: float | None = None
    """Standard deviation of the margins of all pairs that were scored; None for a single pair."""
    faithfulness: list[Faithfulness] = field(default_factory=list)
    """Result of deletions for each method, if it was measured."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of pairs or texts that could not be explained."""

    @property
    def largest_relative_completeness_gap(self) -> float | None:
        """Largest completeness gap of a pair, relative to max(|margin|, margin_std).

        Pairs for which both are 0 are omitted.
        """
        scales = [max(abs(pair.margin), self.margin_std or 0.0) for pair in self.pairs]
        gaps = [
            pair.completeness_gap / scale
            for pair, scale in zip(self.pairs, scales, strict=True)
            if pair.completeness_gap is not None and scale
        ]
        return max(gaps, default=None)
