"""Cost models, which score the harm of a reply; costs above zero are unsafe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.reward_models.core import Conversation, Reward, Scores
from rlhf.reward_models.learned import LearnedReward


class CostModel(Reward):
    """A reward checkpoint read as a cost: positive is unsafe (Safe RLHF, arXiv:2310.12773).

    Train it with ``losses.cost_model``. The Bradley-Terry loss alone determines costs only up to a
    constant, so replies labeled safe can have a positive cost (arXiv:2510.03520).
    """

    def __init__(self, inner: LearnedReward, *, name: str = "cost"):
        self.inner, self.inner_rewards, self.name = inner, (inner,), name

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | None = None, batch_size: int = 16
    ) -> CostModel:
        """Load the cost model at ``path``."""
        return cls(LearnedReward.load(path, device=device, batch_size=batch_size))

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        """Return costs, which are not negated: subtract them from a reward, or constrain them."""
        inner = self.inner.score(conversations)
        unsafe = [None if v is None else float(v > 0) for v in inner.values]
        components = {self.name: inner.values, f"{self.name}.unsafe": unsafe}
        return Scores(inner.values, components, inner.counts, inner.reasons)
