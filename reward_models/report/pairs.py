"""Evaluate a reward on held-out pairs: accuracy, baselines, calibration, length, stress tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.errors import UserError
from rlhf.reward_models.annotator import fit_annotator
from rlhf.reward_models.core import Conversation, Reward
from rlhf.reward_models.pairs import Pair, data_card
from rlhf.reward_models.report import baselines
from rlhf.reward_models.report.calibration import calibrate, fit_temperature
from rlhf.reward_models.report.findings import findings
from rlhf.reward_models.report.intervals import (
    as_row,
    gain_interval,
    pearson,
    share_interval,
    spearman,
)
from rlhf.reward_models.report.stress import stress_tests
from rlhf.stats import jackknife
from rlhf.stats import share_interval as share_of

_WORDS_FROM = 10  # fewest prompts (or training pairs) for a bag of words
_MATCHED = 0.1  # relative difference up to which two replies count as equally long


def evaluate_reward_model(
    reward: Reward,
    pairs: Sequence[Pair],
    *,
    train_pairs: Sequence[Pair] | None = None,
    samples: Sequence[Sequence[Conversation]] | None = None,
    best_of_n: Mapping[str, Any] | None = None,
    dropped: Mapping[str, int] | None = None,
    overlapping: int | None = None,
    stress_size: int = 200,
    invariance_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the report on ``reward`` as plain numbers for JSON; unknown numbers are None.

    Accuracy counts a tie as one half. Pairs without a score are counted and left out.

    Args:
        reward: The reward.
        pairs: Held-out pairs.
        train_pairs: Pairs on which the bag of words is fitted; without them it is cross-fitted.
        samples: Replies of the policy to be trained, one list of conversations for each prompt.
            A policy learns from their spread within a prompt (Razin et al., 2503.15477).
        best_of_n: Reward and gold score of the best of n samples.
        dropped: Reason -> number of rows that are not in ``pairs``, for the data card.
        overlapping: Number of prompts that share 13 words with the training prompts.
        stress_size: Conversations of each stress test; 0 skips these tests.
        invariance_size: Conversations that are scored alone and in batches; 0 skips this test.
        seed: Random seed.

    Raises:
        UserError: No pair could be scored.
    """
    if not pairs:
        raise UserError("evaluate_reward_model needs at least one pair")
    scores = reward.score([p.chosen for p in pairs] + [p.rejected for p in pairs])
    values = np.array([math.nan if v is None else v for v in scores.values])
    chosen, rejected = values[: len(pairs)], values[len(pairs) :]
    known = ~np.isnan(chosen - rejected)
    if not known.any():
        raise UserError(f"no pair could be scored: {dict(scores.counts)}")
    scored = [pair for pair, ok in zip(pairs, known, strict=True) if ok]
    chosen, rejected = chosen[known], rejected[known]
    view = _View(scored, chosen - rejected)
    report = {
        "reward": reward.name,
        "data": {
            **data_card(pairs, train_pairs),
            "unscored": int((~known).sum()),
            "ties": int((view.margins == 0).sum()),
            "counts": dict(scores.counts),
            "dropped": dict(dropped or {}),
            "overlapping": overlapping,
        },
        "accuracy": view.accuracy(),
        "baselines": _baselines(view, reward, train_pairs),
        "by_margin": _by_quantile(view, np.abs(view.margins), parts=10),
        "by_length_gap": _by_quantile(view, baselines.longer(scored), parts=5),
        "by_source": _by_source(view),
        "calibration": _calibration(view, reward.temperature),
        "length": _length(view, chosen, rejected),
        "annotator": _annotator(view),
        "scores": {
            "mean": float(values[~np.isnan(values)].mean()),
            "std": float(np.nanstd(values)),
        },
        "invariance": _invariance(
            reward, [p.chosen for p in scored[:invariance_size]], spread=float(np.nanstd(values))
        ),
        "stress": stress_tests(reward, scored, size=stress_size, seed=seed) if stress_size else {},
        "policy": spread_on_samples(reward, samples) if samples else None,
        "best_of_n": best_of_n,
    }
    report["verdict"] = findings(report)
    return _plain(report)


class _View:
    """Scored pairs, their outcomes (1, 0, or 1/2 for a tie) and prompts."""

    def __init__(self, pairs: Sequence[Pair], margins: np.ndarray):
        self.pairs, self.margins = pairs, margins
        self.wins = wins(margins)
        self.groups = [pair.group for pair in pairs]

    def accuracy(
        self, rows: np.ndarray | None = None, won: np.ndarray | None = None
    ) -> dict[str, float]:
        """Return the share of wins (or of ``won``) in ``rows``, with an interval over prompts."""
        won = self.wins if won is None else won
        rows = np.arange(len(won)) if rows is None else rows
        return share_interval(won[rows], [self.groups[i] for i in rows])

    def difference(self, won: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        """Return the mean of wins - ``won`` on ``rows``, with an interval over prompts."""
        groups = [self.groups[i] for i in rows]
        return gain_interval((self.wins - won)[rows], groups)


def wins(margins: np.ndarray) -> np.ndarray:
    """1 where the margin is positive, 0 where negative, 1/2 where it is zero."""
    return np.where(margins > 0, 1.0, np.where(margins < 0, 0.0, 0.5))


def spread_on_samples(
    reward: Reward, samples: Sequence[Sequence[Conversation]]
) -> dict[str, float | int]:
    """Return the mean and the standard deviation of the scores of a policy's replies.

    ``within_prompt_std`` is the mean standard deviation within a prompt. A checkpoint's sidecar
    stores the first two as its reference.
    """
    flat = [conversation for group in samples for conversation in group]
    values = np.array([math.nan if v is None else v for v in reward(flat)])
    ends = np.cumsum([len(group) for group in samples])
    within = [np.nanstd(part) for part in np.split(values, ends[:-1]) if (~np.isnan(part)).any()]
    return {
        "mean": float(np.nanmean(values)),
        "std": float(np.nanstd(values)),
        "within_prompt_std": float(np.mean(within)),
        "replies": len(flat),
        "prompts": len(samples),
        "unscored": int(np.isnan(values).sum()),
    }


def _baselines(
    view: _View, reward: Reward, train_pairs: Sequence[Pair] | None
) -> dict[str, dict[str, Any]]:
    """Return each baseline's accuracy and the paired gain over it, on the same pairs."""
    length = baselines.longer(view.pairs)
    margins = {"longer wins": length, "shorter wins": -length}
    texts = len(set(view.groups)) if train_pairs is None else len(train_pairs)
    if texts >= _WORDS_FROM:
        margins["bag of words"] = baselines.bag_of_words(view.pairs, train=train_pairs)
    margins["reply without prompt"] = baselines.response_only(reward, view.pairs)
    result = {}
    for name, column in margins.items():
        rows = np.flatnonzero(~np.isnan(column))
        if len(rows) == 0:
            continue
        won = wins(column)
        result[name] = {
            "accuracy": view.accuracy(rows, won),
            "gain": view.difference(won, rows),
        }
    return result


def _by_quantile(view: _View, key: np.ndarray, *, parts: int) -> list[dict[str, Any]]:
    order = np.argsort(key, kind="stable")
    rows_of = [rows for rows in np.array_split(order, parts) if len(rows)]
    return [
        {"from": key[rows].min(), "to": key[rows].max(), "accuracy": view.accuracy(rows)}
        for rows in rows_of
    ]


def _by_source(view: _View) -> dict[str, dict[str, float]]:
    sources = np.array([pair.source for pair in view.pairs])
    names = sorted(set(sources) - {""})
    return {name: view.accuracy(np.flatnonzero(sources == name)) for name in names}


def _calibration(view: _View, temperature: float) -> dict[str, Any]:
    """Return the calibration at both temperatures, given and fitted, and the latter's interval."""
    fitted = fit_temperature(view.margins)
    try:
        fit = fit_annotator({"reward": view.margins}, noise=False, groups=view.groups)
        interval = {**vars(fit.temperature()), "value": fitted}
    except ValueError:  # every pair right, or no margin at all
        interval = None
    return {
        "as_given": calibrate(view.margins, temperature=temperature).to_dict(),
        "fitted": calibrate(view.margins, temperature=fitted).to_dict(),
        "temperature": interval,
    }


def _length(view: _View, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    lengths = np.array([pair.lengths for pair in view.pairs], dtype=float)
    size = np.concatenate([lengths[:, 0], lengths[:, 1]])
    values = np.concatenate([chosen, rejected])
    gap = np.abs(lengths[:, 0] - lengths[:, 1]) / np.maximum(lengths.max(1), 1)
    matched = np.flatnonzero(gap <= _MATCHED)
    groups = [*view.groups, *view.groups]
    interval = jackknife(lambda rows: spearman(values[rows], size[rows]), groups, scale="fisher")
    if abs(interval.value) > 1 - 1e-9:  # all pairs are concordant: use the interval of a share
        units, sign = len(set(groups)), math.copysign(1.0, interval.value)
        interval = share_of(units, units).scaled(2 * sign, -sign)
    return {
        "pearson": pearson(values, size),
        "spearman": interval.value,
        "spearman_interval": as_row(interval, len(values)),
        "margin_spearman": spearman(view.margins, lengths[:, 0] - lengths[:, 1]),
        "matched_accuracy": view.accuracy(matched) if len(matched) else None,
    }


def _annotator(view: _View) -> dict[str, Any]:
    """Fit the labels to score and length, with a share of flipped labels; see ``annotator``."""
    gap = baselines.longer(view.pairs)
    features = {"score": view.margins} | ({"length": gap} if np.ptp(gap) else {})
    try:
        fit = fit_annotator(features, groups=view.groups)
    except ValueError as reason:
        return {"not_fitted": str(reason)}
    weights = {name: vars(estimate) for name, estimate in fit.weights.items()}
    return {"weights": weights, "noise": vars(fit.noise)}


def _invariance(
    reward: Reward, conversations: Sequence[Conversation], *, spread: float
) -> dict[str, float | int] | None:
    """Return the largest change of a score between a text alone and in a batch.

    ``batch``: the batch of all texts; ``order``: the batch in reverse order; ``padding``: the batch
    and a text eight times as long. ``share`` is the largest change divided by ``spread``.
    """
    if not conversations:
        return None
    alone = [reward([conversation])[0] for conversation in conversations]
    *head, last = max(conversations, key=lambda c: len(c[-1]["content"]))
    long = [*head, {**last, "content": " ".join([last["content"]] * 8)}]
    batched = {
        "batch": reward(conversations),
        "order": reward(conversations[::-1])[::-1],
        "padding": reward([*conversations, long])[:-1],
    }
    gaps = {
        kind: max(
            (abs(a - b) for a, b in zip(values, alone, strict=True) if None not in (a, b)),  # type: ignore[operator]
            default=math.nan,
        )
        for kind, values in batched.items()
    }
    largest = max(gaps.values())
    share = largest / spread if spread > 0 else (math.inf if largest > 0 else 0.0)
    return {**gaps, "largest_difference": largest, "share": share, "texts": len(conversations)}


def _plain(value: Any) -> Any:
    """Convert to plain Python numbers; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
