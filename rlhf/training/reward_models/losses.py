"""Losses of reward models in the form that transformers' Trainer takes, and what it reports.

Trainer divides no loss of ours: it hands over the number of labels in the *whole* batch, that is of
cells that differ from ``IGNORED``. So labels are laid out such that these cells are the terms of
the sum, and cutting a batch into micro-batches changes no gradient. Labels have one row per
example. Logits have one row per text: two for a pair, the chosen one first; K for a ranking, the
best one first. M heads are M columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.reward_models import losses
from rlhf.reward_models.losses import IGNORED

Loss = Callable[..., Tensor]
"""(outputs, labels, num_items_in_batch) -> scalar."""

Metrics = Callable[[Any], dict[str, float]]
"""EvalPrediction -> name -> value."""


def as_pairs(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [2B, M] as [B, 2, M]: chosen, rejected."""
    return logits.reshape(len(labels), 2, -1)


def as_candidates(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [N, 1] of groups of ``labels`` [B] candidates as [B, K]; -inf where there is none."""
    places = torch.arange(int(labels.max()), device=logits.device)
    scores = logits.new_full((len(labels), len(places)), -torch.inf)
    return scores.masked_scatter(places < labels[:, None], logits[:, 0])


def on_pairs(per_pair: Callable[[Tensor, Tensor, Tensor], Tensor], *, centre: float = 0.0) -> Loss:
    """A loss of (chosen, rejected, margin), each [B, M], summed over the cells that were drawn.

    Labels [B, M]: the margin for every head that learns from the pair, IGNORED for the others.
    ``centre`` weighs the square of the pair's summed scores.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        chosen, rejected = as_pairs(outputs["logits"].float(), labels).unbind(1)
        drawn = labels != IGNORED
        cells = per_pair(chosen, rejected, torch.where(drawn, labels.float(), 0.0))
        if centre:
            cells = cells + centre * losses.centring(chosen, rejected)
        return torch.where(drawn, cells, 0.0).sum() / _count(num_items_in_batch, drawn.sum())

    return loss


def cost(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The cost model's loss; labels [B, 2] say whether the safer and the worse reply are unsafe."""
    better, worse = as_pairs(outputs["logits"].float(), labels)[..., 0].unbind(1)
    unsafe = labels > 0
    rows = losses.cost_model(worse, better, worse_unsafe=unsafe[:, 1], better_unsafe=unsafe[:, 0])
    return rows.sum() / (_count(num_items_in_batch, labels.numel()) / 2)


def length_debiased(coef: float) -> Loss:
    """ODIN on two heads; labels [B, 2] are the lengths. A mean over what goes through at once."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        chosen, rejected = as_pairs(outputs["logits"].float(), labels).unbind(1)
        longs = labels.float()
        mean = losses.length_debiased(
            (chosen[:, 0], rejected[:, 0]),
            (chosen[:, 1], rejected[:, 1]),
            (longs[:, 0], longs[:, 1]),
            coef=coef,
        )
        return mean * (labels.numel() / _count(num_items_in_batch, labels.numel()))

    return loss


def on_candidates(per_group: Callable[..., Tensor]) -> Loss:
    """A loss of scores [B, K] and their mask; labels [B] are the numbers of candidates."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        scores = as_candidates(outputs["logits"].float(), labels)
        rows = per_group(scores, mask=scores > -torch.inf)
        return rows.sum() / _count(num_items_in_batch, len(labels))

    return loss


def best_first(scores: Tensor, *, mask: Tensor) -> Tensor:
    """-log softmax of the first candidate. [G]"""
    best = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    return losses.best_of(scores, best, mask=mask)


def binary(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross entropy of log-odds [B, K] with labels 0, 1 or IGNORED [B, K]."""
    known = labels != IGNORED
    cells = F.binary_cross_entropy_with_logits(
        outputs["logits"].float(), torch.where(known, labels.float(), 0.0), reduction="none"
    )
    return torch.where(known, cells, 0.0).sum() / _count(num_items_in_batch, known.sum())


def classes(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross entropy of logits [B, C] with class numbers [B]."""
    total = F.cross_entropy(outputs["logits"].float(), labels, reduction="sum")
    return total / _count(num_items_in_batch, len(labels))


def ratings(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Squared error of predictions [B, K]; a missing rating is IGNORED."""
    known = labels != IGNORED
    targets = torch.where(known, labels.float(), torch.nan)
    count = _count(num_items_in_batch, known.sum())
    return losses.regression(outputs["logits"].float(), targets, num_targets=count)


def steps(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross entropy of logits [B, T, 2] at step ends; labels [B, T]."""
    count = _count(num_items_in_batch, (labels != IGNORED).sum())
    return losses.step_ends(outputs["logits"].float(), labels, num_steps=count)


def _count(num_items: Any, here: Any) -> Any:
    """Terms of the whole batch; of this part where the trainer does not say."""
    return here if num_items is None else num_items


def pair_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy (a tie is one half) and margin of the heads' mean score; predictions [N, 2, M]."""
    return _of_margins(np.asarray(prediction.predictions, dtype=float).mean(-1))


def quality_metrics(prediction: Any) -> dict[str, float]:
    """The same for the head that is kept, not the one that soaks up length."""
    return _of_margins(np.asarray(prediction.predictions, dtype=float)[..., 0])


def _of_margins(scores: np.ndarray) -> dict[str, float]:
    margin = scores[:, 0] - scores[:, 1]
    return {"accuracy": float((np.sign(margin) + 1).mean() / 2), "margin": float(margin.mean())}


def candidate_metrics(prediction: Any) -> dict[str, float]:
    """Share of the groups whose best candidate has the highest score; predictions [N, K]."""
    scores, sizes = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    there = np.arange(scores.shape[1]) < sizes[:, None]
    return {"accuracy": float((np.where(there, scores, -np.inf).argmax(1) == 0).mean())}


def binary_metrics(prediction: Any) -> dict[str, float]:
    """Share of the labels on whose side the log-odds stand."""
    labels = np.asarray(prediction.label_ids)
    right = (np.asarray(prediction.predictions) > 0) == (labels > 0.5)
    return {"accuracy": float(right[labels != IGNORED].mean())}


def class_metrics(prediction: Any) -> dict[str, float]:
    """Share of the rows whose class is the likeliest one."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def step_metrics(prediction: Any) -> dict[str, float]:
    """Share of the steps that are judged rightly."""
    labels = np.asarray(prediction.label_ids)
    right = np.asarray(prediction.predictions).argmax(-1) == labels
    return {"accuracy": float(right[labels != IGNORED].mean())}


def rating_metrics(prediction: Any) -> dict[str, float]:
    """Root of the mean squared error, in the ratings' own unit."""
    labels = np.asarray(prediction.label_ids, dtype=float)
    error = (np.asarray(prediction.predictions, dtype=float) - labels)[labels != IGNORED]
    return {"rmse": float(np.sqrt((error**2).mean()))}


def cost_metrics(prediction: Any) -> dict[str, float]:
    """Share of the replies on whose side of zero the cost stands; predictions [N, 2, 1]."""
    costs = np.asarray(prediction.predictions)[..., 0]
    return {"accuracy": float(((costs > 0) == (np.asarray(prediction.label_ids) > 0.5)).mean())}
