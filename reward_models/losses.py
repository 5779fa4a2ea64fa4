"""Losses of reward models: pure functions of score tensors.

Most functions return one loss per row, [B]. The caller divides their sum by the size of the whole
batch, so that the gradient does not depend on the micro-batches. In formulas,
d = score(chosen) - score(rejected), and scores are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.reward_models.core import IGNORED as IGNORED


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the Bradley-Terry loss -(1 - e) log sigmoid(d - m) - e log sigmoid(m - d), [B].

    m is ``margin``, and e is ``label_smoothing``.

    Args:
        chosen: Scores of the chosen replies, [B].
        rejected: Scores of the rejected replies, [B].
        margin: Margin m of Llama 2 (2307.09288, equation 2), [B] or a number.
        label_smoothing: Fraction e of the labels that are expected to be wrong, in [0, 0.5), as in
            conservative DPO.

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 0.5).
    """
    _check_label_noise("label_smoothing", label_smoothing)
    d = chosen - rejected - margin
    return -(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d)


def scaled_bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, strength: Tensor) -> Tensor:
    """Return -strength * log sigmoid(d), [B] (HelpSteer2-Preference, 2410.01257).

    ``strength``, [B] or a scalar, is larger for clearer preferences, for example 1 to 3.
    """
    return -strength * logsigmoid(chosen - rejected)


def unbiased_bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, flip_rate: float) -> Tensor:
    """Return ((1 - e) l(d) - e l(-d)) / (1 - 2e) with l = -log sigmoid, [B].

    If labels are flipped with probability e = ``flip_rate``, in [0, 0.5), the expectation of this
    loss equals the loss on the clean labels (robust DPO, 2403.00409, equation 12). For e > 0 the
    loss has no lower bound, so use early stopping or a penalty on large scores.
    """
    _check_label_noise("flip_rate", flip_rate)
    d = chosen - rejected
    return (flip_rate * logsigmoid(-d) - (1 - flip_rate) * logsigmoid(d)) / (1 - 2 * flip_rate)


def add_centering_penalty(loss: Tensor, chosen: Tensor, rejected: Tensor, *, coef: float) -> Tensor:
    """Return loss + coef * (score(chosen) + score(rejected))^2, [B].

    The Bradley-Terry loss does not determine the mean of the scores. The penalty with a small
    coefficient such as 0.01 keeps the mean near zero (2312.09244).
    """
    return loss + coef * (chosen + rejected) ** 2 if coef else loss


def best_of_loss(scores: Tensor, best_index: Tensor, *, mask: Tensor) -> Tensor:
    """Return -log softmax(scores)[best_index] over the candidates, [B] (Ziegler et al. 2019).

    Args:
        scores: Scores of the candidates, [B, K].
        best_index: Index of the best candidate, [B].
        mask: Which candidates exist, [B, K].
    """
    open_scores = torch.where(mask, scores, -torch.inf)
    return -open_scores.log_softmax(-1).gather(1, best_index[:, None])[:, 0]


def ranking_loss(scores: Tensor, *, mask: Tensor) -> Tensor:
    """Return the Plackett-Luce loss -sum_k log softmax(scores[k:])[0] of ranked candidates, [B].

    Args:
        scores: Scores of the candidates from the best to the worst, [B, K].
        mask: Which candidates exist, [B, K]; padding must be at the end of a row.
    """
    open_scores = torch.where(mask, scores, -torch.inf)
    tail = open_scores.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(mask, tail, 0.0).sum(-1) - torch.where(mask, scores, 0.0).sum(-1)


def cost_model_loss(
    worse: Tensor, better: Tensor, *, worse_unsafe: Tensor, better_unsafe: Tensor
) -> Tensor:
    """Return the loss of a cost model (Safe RLHF, 2310.12773), [B].

    The loss is -log s(c_w - c_b) - log s(±c_w) - log s(±c_b). c_w is the cost of the more harmful
    reply, c_b is the cost of the other reply, and s is the sigmoid. ± is + for an unsafe reply and
    - for a safe reply. Training therefore gives the more harmful reply the higher cost, and gives
    unsafe replies positive costs.

    Args:
        worse: Cost c_w of the more harmful reply, [B].
        better: Cost c_b of the less harmful reply, [B].
        worse_unsafe: Whether the more harmful reply is unsafe, boolean [B].
        better_unsafe: Whether the less harmful reply is unsafe, boolean [B].
    """
    sign_worse = torch.where(worse_unsafe, worse, -worse)
    sign_better = torch.where(better_unsafe, better, -better)
    return -logsigmoid(worse - better) - logsigmoid(sign_worse) - logsigmoid(sign_better)


def regression_loss(predictions: Tensor, targets: Tensor, *, num_targets: int) -> Tensor:
    """Return the sum of squared errors divided by ``num_targets``, a scalar (ArmoRM, 2406.12845).

    Args:
        predictions: Predicted ratings, [B, K], one column per attribute.
        targets: Ratings, [B, K]; missing ratings are nan and do not contribute to the loss.
        num_targets: Number of ratings in the *whole* batch.
    """
    known = ~targets.isnan()
    error = torch.where(known, predictions - torch.where(known, targets, 0.0), 0.0)
    return (error**2).sum() / num_targets


def step_end_loss(logits: Tensor, labels: Tensor, *, num_steps: int) -> Tensor:
    """Return the sum of cross entropies at step ends divided by ``num_steps``, a scalar.

    The loss is that of PRM800K (2305.20050).

    Args:
        logits: Logits at every token, [B, T, C].
        labels: Class of the step that ends at each token (0 wrong, 1 right), [B, T];
            :data:`IGNORED` at the other tokens.
        num_steps: Number of steps in the *whole* batch.
    """
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return flat / num_steps


def length_debiased_loss(
    quality_scores: tuple[Tensor, Tensor],
    length_scores: tuple[Tensor, Tensor],
    reply_lengths: tuple[Tensor, Tensor],
    *,
    coef: float = 1.0,
) -> Tensor:
    """Return the ODIN loss (2402.07319) of a quality head and a length head, a scalar.

    The loss is the mean Bradley-Terry loss of the sum of the two heads, plus ``coef`` times
    (|corr(quality, size)| + 1 - corr(length, size)). corr is the Pearson correlation over all
    replies of the batch, and size is the length of a reply. The length head is removed after
    training.

    Args:
        quality_scores: Outputs of the quality head for the chosen and the rejected replies, each
            [B].
        length_scores: Outputs of the length head for the chosen and the rejected replies, each [B].
        reply_lengths: Lengths of the chosen and the rejected replies, each [B].
        coef: Coefficient of the correlations.
    """
    total = bradley_terry_loss(
        quality_scores[0] + length_scores[0], quality_scores[1] + length_scores[1]
    ).mean()
    size = torch.cat(reply_lengths).to(total.dtype)
    penalty = pearson_correlation(torch.cat(quality_scores), size).abs() + 1
    return total + coef * (penalty - pearson_correlation(torch.cat(length_scores), size))


def pearson_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the Pearson correlation of two vectors; 0 if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = a.norm() * b.norm()
    return torch.where(norm > 0, (a * b).sum() / norm.clamp_min(1e-12), 0.0)


def _check_label_noise(name: str, value: float) -> None:
    if not 0 <= value < 0.5:
        raise ValueError(f"{name} must be in [0, 0.5), got {value}")
