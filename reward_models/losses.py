"""Losses of reward models: pure functions of score tensors, one loss per row.

The caller divides by the size of the whole batch, so that micro-batches do not change a gradient.
In formulas, d = score(chosen) - score(rejected); scores are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

IGNORED = -100
"""Label of tokens and texts that are not trained on, as in torch's cross entropy."""


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return -(1 - e) log sigmoid(d - margin) - e log sigmoid(margin - d), [B].

    Bradley-Terry with the margin of Llama 2 (2307.09288, equation 2) and the label smoothing of
    conservative DPO, for labels of which a share e is expected to be wrong.
    """
    _check_label_noise("label_smoothing", label_smoothing)
    d = chosen - rejected - margin
    return -(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d)


def scaled_bradley_terry(chosen: Tensor, rejected: Tensor, *, strength: Tensor) -> Tensor:
    """Return -strength * log sigmoid(d), [B].

    Clearer preferences have more weight (HelpSteer2-Preference, 2410.01257). ``strength`` is [B] or
    a scalar, for example 1 to 3.
    """
    return -strength * logsigmoid(chosen - rejected)


def unbiased_bradley_terry(chosen: Tensor, rejected: Tensor, *, flip_rate: float) -> Tensor:
    """Return ((1 - e) l(d) - e l(-d)) / (1 - 2e) with l = -log sigmoid, [B].

    Its mean over labels flipped with probability e equals the loss on clean labels (robust DPO,
    2403.00409, equation 12). It is unbounded below for e > 0: use early stopping, or a penalty on
    large scores.
    """
    _check_label_noise("flip_rate", flip_rate)
    d = chosen - rejected
    return (flip_rate * logsigmoid(-d) - (1 - flip_rate) * logsigmoid(d)) / (1 - 2 * flip_rate)


def centered(loss: Tensor, chosen: Tensor, rejected: Tensor, *, coef: float) -> Tensor:
    """Return loss + coef * (score(chosen) + score(rejected))^2, [B].

    Bradley-Terry leaves the mean of the scores undetermined; a small coefficient such as 0.01 keeps
    it near zero (2312.09244).
    """
    return loss + coef * (chosen + rejected) ** 2 if coef else loss


def best_of(scores: Tensor, best: Tensor, *, mask: Tensor) -> Tensor:
    """Return -log softmax(scores)[best] over the candidates in ``mask``, [B] (Ziegler et al. 2019).

    ``scores`` [B, K], ``best`` [B] the index of the picked candidate, ``mask`` [B, K].
    """
    open_scores = torch.where(mask, scores, -torch.inf)
    return -open_scores.log_softmax(-1).gather(1, best[:, None])[:, 0]


def ranking(scores: Tensor, *, mask: Tensor) -> Tensor:
    """Return the Plackett-Luce loss -sum_k log softmax(scores[k:])[0] of ranked candidates, [B].

    ``scores`` and ``mask`` are [B, K]; padding must come last.
    """
    open_scores = torch.where(mask, scores, -torch.inf)
    tail = open_scores.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(mask, tail, 0.0).sum(-1) - torch.where(mask, scores, 0.0).sum(-1)


def cost_model(
    worse: Tensor, better: Tensor, *, worse_unsafe: Tensor, better_unsafe: Tensor
) -> Tensor:
    """Return -log s(c_w - c_b) - log s(+-c_w) - log s(+-c_b), [B], with + for unsafe replies.

    In Safe RLHF (2310.12773), costs are ordered, and their sign is positive for unsafe replies; s
    is the sigmoid. ``worse`` is the cost of the more harmful reply; the flags are boolean [B].
    """
    sign_worse = torch.where(worse_unsafe, worse, -worse)
    sign_better = torch.where(better_unsafe, better, -better)
    return -logsigmoid(worse - better) - logsigmoid(sign_worse) - logsigmoid(sign_better)


def regression(predictions: Tensor, targets: Tensor, *, num_targets: int) -> Tensor:
    """Return the squared error summed over the known targets, divided by ``num_targets``. Scalar.

    Both are [B, K], one column per attribute; a missing rating is nan (ArmoRM, 2406.12845).
    ``num_targets`` counts the ratings of the *whole* batch.
    """
    known = ~targets.isnan()
    error = torch.where(known, predictions - torch.where(known, targets, 0.0), 0.0)
    return (error**2).sum() / num_targets


def step_ends(logits: Tensor, labels: Tensor, *, num_steps: int) -> Tensor:
    """Return the cross entropy at step ends divided by ``num_steps`` of the whole batch, a scalar.

    ``logits`` [B, T, C] at every token, ``labels`` [B, T] the class of the step that ends at this
    token (0 wrong, 1 right), :data:`IGNORED` elsewhere (PRM800K, 2305.20050).
    """
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return flat / num_steps


def length_debiased(
    quality: tuple[Tensor, Tensor],
    length: tuple[Tensor, Tensor],
    sizes: tuple[Tensor, Tensor],
    *,
    coef: float = 1.0,
) -> Tensor:
    """Return the ODIN loss (2402.07319) of a quality head and a length head.

    Each pair is (chosen [B], rejected [B]): the quality head, the length head, and the replies'
    lengths. The loss is Bradley-Terry on the sum of the heads, plus ``coef`` times |corr(quality,
    length)| + 1 - corr(length head, length) over the batch; a scalar mean. The length head is
    dropped after training.
    """
    total = bradley_terry(quality[0] + length[0], quality[1] + length[1]).mean()
    size = torch.cat(sizes).to(total.dtype)
    penalty = correlation(torch.cat(quality), size).abs() + 1
    return total + coef * (penalty - correlation(torch.cat(length), size))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the Pearson correlation of two vectors; 0 if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = a.norm() * b.norm()
    return torch.where(norm > 0, (a * b).sum() / norm.clamp_min(1e-12), 0.0)


def _check_label_noise(name: str, value: float) -> None:
    if not 0 <= value < 0.5:
        raise ValueError(f"{name} must be in [0, 0.5), got {value}")
