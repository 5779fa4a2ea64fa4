"""Cost models, which score how harmful a reply is; a cost above zero means unsafe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.reward_models.core import Conversation, Reward, Scores
from rlhf.reward_models.learned import LearnedReward


class CostModel(Reward):
    """A cost that is the score of a checkpoint; unsafe replies have a positive cost.

    The checkpoint must be trained with ``losses.cost_model_loss`` (Safe RLHF, arXiv:2310.12773).
    With the Bradley-Terry loss alone, costs are determined only up to a constant, so replies that
    are labeled safe can have a positive cost (arXiv:2510.03520).
    """

    def __init__(self, inner: LearnedReward, *, name: str = "cost"):
        self.inner, self.inner_rewards, self.name = inner, (inner,), name

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | None = None, batch_size: int = 16
    ) -> CostModel:
        """Load the cost model at ``path``, a folder or a Hugging Face Hub id."""
        return cls(LearnedReward.load(path, device=device, batch_size=batch_size))

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        """Return the costs of N conversations.

        The costs are not negated, so subtract them from a reward, or use them as a constraint. The
        component ``<name>.unsafe`` is 1.0 for a positive cost, else 0.0.
        """
        inner = self.inner.score(conversations)
        unsafe = [None if v is None else float(v > 0) for v in inner.values]
        components = {self.name: inner.values, f"{self.name}.unsafe": unsafe}
        return Scores(inner.values, components, inner.counts, inner.reasons)
