"""Measure the faithfulness of attributions by the deletion of tokens.

The metric is the comprehensiveness of DeYoung et al. 2020 (ERASER, arXiv:1911.03429, section 4.2).
The baseline is the deletion of random tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf.explain.score_function import DifferentiableReward
from rlhf.stats import Interval, difference, interval

FRACTIONS = (0.1, 0.2, 0.3)
"""Deleted fractions of the tokens of both replies."""


@dataclass(frozen=True)
class AttributedText:
    """A tokenized text with its attributions, and the constants of its score."""

    ids: list[int]
    """Token ids, [T]."""
    deletable: list[int]
    """Positions of the tokens of the reply."""
    attributions: list[float]
    """Attribution of the margin to each token, [T]."""
    constants: Mapping[int, float] = field(default_factory=dict)
    """Result of `DifferentiableReward.scores_without_models`."""


@dataclass(frozen=True)
class DeletionResult:
    """Decrease of the margin after a fraction of the tokens of both replies was deleted.

    Each cluster of pairs, such as a prompt, has the same weight in the means.
    """

    fraction: float
    """Deleted fraction of the tokens."""
    top: Interval
    """Mean decrease after the tokens with the largest attributions were deleted."""
    random: Interval
    """Mean decrease after random tokens were deleted."""
    gain: Interval
    """Mean paired difference top - random."""


@dataclass(frozen=True)
class Faithfulness:
    """Decrease of the margin by deletion, compared with random deletion, with 95% intervals."""

    method: str
    """Attribution method."""
    pairs: int
    """Number of pairs."""
    overall: DeletionResult
    """Means over all fractions; its fraction is the mean fraction."""
    by_fraction: list[DeletionResult]
    """One result for each fraction."""


def measure_faithfulness(
    reward: DifferentiableReward,
    pairs: Sequence[tuple[AttributedText, AttributedText]],
    clusters: Sequence[Hashable],
    *,
    method: str,
    draws: int = 4,
    seed: int = 0,
) -> Faithfulness:
    """Measure margins without the tokens with the largest attributions, and without random tokens.

    Both deletions remove the same number of tokens from each reply of a pair, so they differ only
    in the choice of the tokens. The remaining tokens are joined without a gap.

    Args:
        reward: The reward of the pairs.
        pairs: (chosen, rejected) texts.
        clusters: Independent unit of each pair, such as its prompt.
        method: Name of the attribution method.
        draws: Number of random deletions, which are averaged.
        seed: Random seed.
    """
    generator = np.random.default_rng(seed)
    top = np.zeros((len(pairs), len(FRACTIONS)))
    random = np.zeros_like(top)
    for row, pair in enumerate(pairs):
        decreases = _margin_decreases(reward, pair, draws=draws, generator=generator)
        top[row], random[row] = decreases[:, 0], decreases[:, 1:].mean(1)
    by_fraction = [
        _deletion_result(fraction, top[:, i], random[:, i], clusters)
        for i, fraction in enumerate(FRACTIONS)
    ]
    overall = _deletion_result(float(np.mean(FRACTIONS)), top.mean(1), random.mean(1), clusters)
    return Faithfulness(method, len(pairs), overall, by_fraction)


def _deletion_result(
    fraction: float, top: np.ndarray, random: np.ndarray, clusters: Sequence[Hashable]
) -> DeletionResult:
    return DeletionResult(
        fraction,
        interval(top, clusters),
        interval(random, clusters),
        difference(top, random, clusters),
    )


def _margin_decreases(
    reward: DifferentiableReward,
    pair: tuple[AttributedText, AttributedText],
    *,
    draws: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return the decreases of the margin for each deleted fraction, [F, 1 + draws].

    The first column is for the tokens with the largest attributions, the others are for random
    tokens.
    """
    deleted = [top_positions(pair, fraction) for fraction in FRACTIONS]
    decreases = np.zeros((len(FRACTIONS), 1 + draws))
    for side, (sign, text) in enumerate(zip((1.0, -1.0), pair, strict=True)):
        choices: list[Sequence[int]] = []
        for top in (positions[side] for positions in deleted):
            random = (
                generator.choice(text.deletable, size=len(top), replace=False).tolist()
                for _ in range(draws)
            )
            choices += [top, *random]
        shortened = [without_positions(text.ids, choice) for choice in choices]
        whole, *scores = reward.scores_of_ids([text.ids, *shortened], text.constants)
        decreases += sign * (whole - np.array(scores).reshape(decreases.shape))
    return decreases


def top_positions(
    pair: tuple[AttributedText, AttributedText], fraction: float
) -> tuple[list[int], list[int]]:
    """Return the positions of the tokens with the largest attributions in both replies.

    At least one token is selected unless both replies have one token. Each reply keeps at least one
    token.
    """
    ranked = sorted(
        (-text.attributions[i], side, i) for side, text in enumerate(pair) for i in text.deletable
    )
    count = max(1, round(fraction * len(ranked)))
    selected: tuple[list[int], list[int]] = ([], [])
    for _, side, position in ranked:
        if len(selected[0]) + len(selected[1]) == count:
            break
        if len(selected[side]) + 1 < len(pair[side].deletable):
            selected[side].append(position)
    return selected


def without_positions(ids: Sequence[int], positions: Sequence[int]) -> list[int]:
    """Return the ids without those at the given positions."""
    removed = set(positions)
    return [token for i, token in enumerate(ids) if i not in removed]
