"""Cost models: the harm of a reply; zero separates safe from unsafe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from rlhf.reward_models.core import Conversation, Reward, Scores
from rlhf.reward_models.learned import LearnedReward


class CostModel(Reward):
    """A reward checkpoint read as a cost: positive is unsafe (Safe RLHF, 2310.12773).

    Train it with ``losses.cost_model``. Bradley-Terry alone orders replies and leaves zero
    undetermined, so that replies labelled safe can have a positive cost (2510.03520);
    :func:`zero_threshold` measures it. The value is a cost: subtract it, or constrain it.
    """

    def __init__(self, inner: LearnedReward, *, name: str = "cost"):
        self.inner, self.name = inner, name

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | None = None, batch_size: int = 16
    ) -> CostModel:
        """Load the cost model at ``path``."""
        return cls(LearnedReward.load(path, device=device, batch_size=batch_size))

    def checkpoints(self) -> tuple[LearnedReward, ...]:
        return (self.inner,)

    def score(self, conversations: Sequence[Conversation]) -> Scores:
        inner = self.inner.score(conversations)
        unsafe = [None if v is None else float(v > 0) for v in inner.values]
        components = {self.name: inner.values, f"{self.name}.unsafe": unsafe}
        return Scores(inner.values, components, inner.counts, inner.reasons)


@dataclass(frozen=True)
class ZeroThreshold:
    """How well the sign of a cost separates unsafe from safe; nan where a class is empty."""

    precision: float
    """Share of the replies with positive cost that are unsafe."""
    recall: float
    """Share of the unsafe replies with positive cost."""
    false_alarms: float
    """Share of the safe replies with positive cost."""
    auc: float
    """P(an unsafe reply costs more than a safe one), ties one half."""


def zero_threshold(costs: Sequence[float], unsafe: Sequence[bool]) -> ZeroThreshold:
    """Compare the sign of ``costs`` [N] with labels ``unsafe`` [N]."""
    cost, label = np.asarray(costs, dtype=float), np.asarray(unsafe, dtype=bool)
    if len(cost) != len(label):
        raise ValueError(f"{len(cost)} costs for {len(label)} labels")
    flagged = cost > 0

    def share(of: np.ndarray, among: np.ndarray) -> float:
        return float(of[among].mean()) if among.any() else float("nan")

    auc = float("nan")
    if label.any() and not label.all():
        wins = stats.mannwhitneyu(cost[label], cost[~label], method="asymptotic").statistic
        auc = float(wins / (label.sum() * (~label).sum()))
    return ZeroThreshold(share(label, flagged), share(flagged, label), share(flagged, ~label), auc)


def safety_gate(costs: Sequence[float], *, limit: float, confidence: float = 0.95) -> bool:
    """Whether the upper confidence bound of the mean cost is at most ``limit``.

    The bound is one-sided Student's t on independent costs [N], N >= 2. A policy is accepted only
    if the data show that it is safe (HC-RLHF, 2506.08266).
    """
    cost = np.asarray(costs, dtype=float)
    if len(cost) < 2:
        raise ValueError("safety_gate needs at least two costs")
    error = cost.std(ddof=1) / np.sqrt(len(cost))
    return bool(cost.mean() + stats.t.ppf(confidence, len(cost) - 1) * error <= limit)
