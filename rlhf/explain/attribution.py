"""Attribute a score to the tokens of a text: gradient x input, and integrated gradients.

The attribution of a token is the sum of the attributions of the dimensions of its input embedding.
Integrated gradients attribute the score of the text minus the score of a reference text. Gradient x
input is the first-order estimate of the score minus the score of zero embeddings.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

ScoreFunction = Callable[[Sequence[Tensor]], Tensor]
"""Function from the input embeddings of each model, each [B, T, D], to scores [B]."""

_NODES_PER_INTERVAL = 6
_NODES, _WEIGHTS = (
    (np.polynomial.legendre.leggauss(_NODES_PER_INTERVAL)[0] + 1) / 2,
    np.polynomial.legendre.leggauss(_NODES_PER_INTERVAL)[1] / 2,
)
"""Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""


@dataclass(frozen=True)
class Attribution:
    """The attribution of a score to the tokens of a text."""

    values: list[float]
    """Attribution to each token, [T]."""
    score: float
    """Score of the text."""
    reference_score: float | None = None
    """Score of the reference text. This and the other fields below are None for gradient x
    input."""
    gap: float | None = None
    """Completeness gap: |sum of the attributions - (score - reference score)|."""
    steps: int | None = None
    """Number of gradients that were computed along the path."""


def gradient_times_input(score: ScoreFunction, inputs: Sequence[Tensor]) -> Attribution:
    """Return the gradient of the score times the input embedding of each token.

    Args:
        score: The score function.
        inputs: Input embeddings of the text for each model, each [T, D].
    """
    gradients, scores = _gradients(score, [x[None] for x in inputs])
    values = _gradient_times_input_per_token(gradients, inputs)[0]
    return Attribution(values.tolist(), float(scores[0]))


def integrated_gradients(
    score: ScoreFunction,
    inputs: Sequence[Tensor],
    references: Sequence[Tensor],
    *,
    tolerance: float,
    max_steps: int = 600,
) -> Attribution:
    """Return the integrated gradients of the score from reference embeddings to the text.

    The attributions sum to score - reference score (completeness; Sundararajan et al. 2017,
    arXiv:1703.01365, eq. 1 and proposition 1). The integral over the path is computed by
    Gauss-Legendre quadrature on intervals. Each interval has an exact error measure: its
    attributions must sum to the difference of the scores at its ends. The interval with the largest
    error is bisected until the sum of all errors is at most ``tolerance``. Fixed steps fail for
    decoders with RMSNorm, whose scores change within a small fraction of the path.

    Args:
        score: The score function.
        inputs: Input embeddings of the text for each model, each [T, D].
        references: Embeddings at the start of the path for each model, each [T, D]. A token whose
            two embeddings are equal has the attribution 0.
        tolerance: Largest accepted sum of errors, in units of the score.
        max_steps: Maximum number of gradients, of which at least 6 are computed. If it is reached,
            the gap can exceed the tolerance.
    """
    root = _integrate(score, inputs, references, 0.0, 1.0)
    queue = [root]
    steps = _NODES_PER_INTERVAL
    while sum(part.error for part in queue) > tolerance:
        if steps + 2 * _NODES_PER_INTERVAL > max_steps:
            break
        worst = heapq.heappop(queue)
        middle = (worst.start + worst.end) / 2
        for start, end in ((worst.start, middle), (middle, worst.end)):
            heapq.heappush(queue, _integrate(score, inputs, references, start, end))
        steps += 2 * _NODES_PER_INTERVAL
    values = torch.stack([part.values for part in queue]).sum(0)
    gap = abs(float(values.sum()) - (root.end_score - root.start_score))
    return Attribution(values.tolist(), root.end_score, root.start_score, gap, steps)


@dataclass(order=True)
class _PathInterval:
    """The contribution of an interval of the path to integrated gradients."""

    negative_error: float
    """Negative error, so that the first element of a heap has the largest error."""
    start: float
    end: float
    values: Tensor = field(compare=False)
    """Attributions, [T], in float64."""
    start_score: float = field(compare=False)
    end_score: float = field(compare=False)

    @property
    def error(self) -> float:
        """|Sum of the attributions - difference of the scores at the ends|."""
        return -self.negative_error


def _integrate(
    score: ScoreFunction,
    inputs: Sequence[Tensor],
    references: Sequence[Tensor],
    start: float,
    end: float,
) -> _PathInterval:
    """Integrate the gradients over the interval [start, end] of the path."""
    points = torch.tensor([*(start + (end - start) * _NODES), start, end])
    changes = [x - reference for x, reference in zip(inputs, references, strict=True)]
    batch = [
        reference + points.to(change)[:, None, None] * change
        for reference, change in zip(references, changes, strict=True)
    ]
    gradients, scores = _gradients(score, batch)
    along_path = _gradient_times_input_per_token(gradients, changes)[:-2]
    values = (end - start) * (torch.from_numpy(_WEIGHTS) @ along_path)
    start_score, end_score = scores[-2:].double().tolist()
    error = abs(float(values.sum()) - (end_score - start_score))
    return _PathInterval(-error, start, end, values, start_score, end_score)


def _gradients(score: ScoreFunction, batch: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the scores by the inputs, each [B, T, D], and the scores [B]."""
    inputs = [x.detach().requires_grad_(True) for x in batch]
    with torch.enable_grad():
        scores = score(inputs)
        if not scores.requires_grad:  # such as a threshold, which is constant almost everywhere
            return [torch.zeros_like(x) for x in batch], scores
        gradients = torch.autograd.grad(scores.sum(), inputs, allow_unused=True)
    filled = [
        torch.zeros_like(x) if gradient is None else gradient
        for x, gradient in zip(inputs, gradients, strict=True)
    ]
    return filled, scores.detach()


def _gradient_times_input_per_token(
    gradients: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Tensor:
    """Return gradient x input of each token, summed over dimensions and models, [B, T], float64."""
    pairs = zip(gradients, inputs, strict=True)
    products = [(g.cpu().double() * x.cpu().double()).sum(-1) for g, x in pairs]
    return torch.stack(products).sum(0)
