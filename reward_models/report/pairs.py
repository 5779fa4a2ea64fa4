"""Evaluate a reward on held-out pairs: accuracy, baselines, calibration, length, stress tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rlhf.common.text import reason_counts_text
from rlhf.errors import UserError
from rlhf.reward_models.annotator import fit_annotator
from rlhf.reward_models.core import Conversation, Reward
from rlhf.reward_models.pairs import Pair, data_card
from rlhf.reward_models.report import baselines
from rlhf.reward_models.report.calibration import calibration_metrics, temperature_interval
from rlhf.reward_models.report.findings import finding_sentences
from rlhf.reward_models.report.intervals import (
    interval_as_dict,
    paired_difference_interval,
    pearson,
    proportion_interval,
    spearman,
)
from rlhf.reward_models.report.stress import run_stress_tests
from rlhf.stats import jackknife
from rlhf.stats import share_interval as share_of

# Minimum number of training pairs for the bag-of-words baseline; if no training pairs are given,
# the minimum number of prompts.
_MIN_TEXTS_FOR_WORDS = 10
# Largest relative difference in length of two replies that are treated as equally long.
_MAX_MATCHED_GAP = 0.1


def evaluate_reward_model(
    reward: Reward,
    pairs: Sequence[Pair],
    *,
    train_pairs: Sequence[Pair] | None = None,
    scored: ScoredPairs | None = None,
    samples: Sequence[Sequence[Conversation]] | None = None,
    best_of_n: Mapping[str, Any] | None = None,
    dropped: Mapping[str, int] | None = None,
    overlapping: int | None = None,
    stress_size: int = 200,
    invariance_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the report on ``reward`` as plain values for JSON; unknown numbers are None.

    In the accuracy, a tie counts 1/2. Pairs that could not be scored are counted and omitted.

    Args:
        reward: The reward to evaluate.
        pairs: Held-out pairs.
        train_pairs: Pairs on which the bag-of-words baseline is fitted; by default, it is
            cross-fitted on ``pairs``.
        scored: The scores of ``pairs``; by default, they are computed.
        samples: Replies of the policy, see `score_statistics_on_samples`; None without replies.
        best_of_n: Reward and gold score of the best of n samples; copied into the report.
        dropped: Reason -> number of dropped rows, for the data card.
        overlapping: Number of pairs whose prompts share 13 consecutive words with training prompts;
            None if it is unknown.
        stress_size: Maximum number of conversations in each stress test; 0 skips these tests.
        invariance_size: Maximum number of conversations whose scores alone and in batches are
            compared; 0 skips this test.
        seed: Seed of the selection of conversations for the stress tests.

    Raises:
        UserError: There are no pairs, or none could be scored.
    """
    if not pairs:
        raise UserError("evaluate_reward_model needs at least one pair")
    scored = scored or ScoredPairs(reward, pairs)
    report = {
        "reward": reward.name,
        "data": data_card(pairs, train_pairs)
        | {**scored.data, "dropped": dict(dropped or {}), "overlapping": overlapping},
        "accuracy": scored.accuracy(),
        "baselines": _accuracy_and_gain_by_baseline(scored, reward, train_pairs),
        "by_margin": _accuracy_by_quantile(scored, np.abs(scored.margins), num_bins=10),
        "by_length_gap": _accuracy_by_quantile(
            scored, baselines.length_differences(scored.pairs), num_bins=5
        ),
        "by_source": _accuracy_by_source(scored),
        "calibration": _calibration(scored, reward.temperature),
        "length": _length_dependence(scored),
        "annotator": _fitted_annotator(scored),
        "scores": {"mean": scored.mean, "std": scored.std},
        "invariance": _batch_dependence(
            reward, scored.pairs[:invariance_size], score_std=scored.std
        ),
        "stress": run_stress_tests(reward, scored.pairs, size=stress_size, seed=seed),
        "policy": score_statistics_on_samples(reward, samples) if samples else None,
        "best_of_n": best_of_n,
    }
    return _to_json_values(report | {"verdict": finding_sentences(report)})


class ScoredPairs:
    """The P pairs that a reward could score, with their scores and prompts.

    ``chosen`` and ``rejected`` are the scores, and ``margins`` are chosen - rejected, each an array
    [P]. ``groups`` are the keys of the pairs' prompts, [P]. ``mean`` and ``std`` are those of all
    scores. ``data`` has the numbers of unscored pairs and ties, and the counts of the reward.

    Raises:
        UserError: No pair could be scored.
    """

    def __init__(self, reward: Reward, pairs: Sequence[Pair]):
        scores = reward.score([p.chosen for p in pairs] + [p.rejected for p in pairs])
        values = np.array(scores.values, dtype=float)
        chosen, rejected = np.split(values, 2)
        known = ~np.isnan(chosen - rejected)
        if not known.any():
            raise UserError(f"no pair could be scored: {reason_counts_text(scores.counts)}")
        self.pairs = [pair for pair, ok in zip(pairs, known, strict=True) if ok]
        self.groups = [pair.prompt_json for pair in self.pairs]
        self.chosen, self.rejected = chosen[known], rejected[known]
        self.margins = self.chosen - self.rejected
        self.mean, self.std = float(np.nanmean(values)), float(np.nanstd(values))
        self.data = {
            "unscored": int((~known).sum()),
            "ties": int((self.margins == 0).sum()),
            "counts": dict(scores.counts),
        }

    def accuracy(self, rows: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """Return the accuracy with an interval over prompts.

        ``rows`` selects the pairs; by default, all pairs are used.
        """
        return proportion_interval(
            win_indicators(self.margins[rows]), np.array(self.groups)[rows].tolist()
        )


def win_indicators(margins: np.ndarray) -> np.ndarray:
    """Return 1.0 for each positive margin, 0.0 for each negative one, and 0.5 for zeros, [N]."""
    return np.where(margins > 0, 1.0, np.where(margins < 0, 0.0, 0.5))


def score_statistics_on_samples(
    reward: Reward, samples: Sequence[Sequence[Conversation]]
) -> dict[str, float | int]:
    """Return statistics of the scores of a policy's replies.

    Their spread affects how fast the policy learns (Razin et al., 2503.15477).

    ``mean`` and ``std`` are the mean and the standard deviation of all scores; the sidecar of a
    checkpoint stores them. ``within_prompt_std`` is the standard deviation of the scores of one
    prompt, averaged over prompts. All three are nan if no reply has a score. ``replies``,
    ``prompts`` and ``unscored`` are the numbers of replies, prompts and replies without a score.

    Args:
        reward: The reward.
        samples: One list of conversations for each prompt.
    """
    flat = [conversation for group in samples for conversation in group]
    values = np.array(reward(flat), dtype=float)
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


def _accuracy_and_gain_by_baseline(
    scored: ScoredPairs, reward: Reward, train_pairs: Sequence[Pair] | None
) -> dict[str, dict[str, Any]]:
    """Return name -> accuracy of the baseline, and the reward's paired gain over it.

    The accuracy and the gain are computed on the pairs that the baseline could score. A baseline
    that could score no pair is omitted.
    """
    length = baselines.length_differences(scored.pairs)
    margins = {"longer wins": length, "shorter wins": -length}
    texts = len(set(scored.groups)) if train_pairs is None else len(train_pairs)
    if texts >= _MIN_TEXTS_FOR_WORDS:
        margins["bag of words"] = baselines.bag_of_words_margins(scored.pairs, train=train_pairs)
    margins["reply without prompt"] = baselines.response_only_margins(reward, scored.pairs)
    result = {}
    for name, column in margins.items():
        rows = np.flatnonzero(~np.isnan(column))
        if len(rows):
            groups = [scored.groups[i] for i in rows]
            gains = win_indicators(scored.margins[rows]) - win_indicators(column[rows])
            result[name] = {
                "accuracy": proportion_interval(win_indicators(column[rows]), groups),
                "gain": paired_difference_interval(gains, groups),
            }
    return result


def _accuracy_by_quantile(
    scored: ScoredPairs, key: np.ndarray, *, num_bins: int
) -> list[dict[str, Any]]:
    """Sort the pairs by ``key`` [P] into bins of equal size; return the accuracy of each bin."""
    order = np.argsort(key, kind="stable")
    return [
        {"from": key[rows].min(), "to": key[rows].max(), "accuracy": scored.accuracy(rows)}
        for rows in np.array_split(order, min(num_bins, len(order)))
    ]


def _accuracy_by_source(scored: ScoredPairs) -> dict[str, dict[str, float]]:
    """Return source -> accuracy, without pairs that have no source."""
    sources = np.array([pair.source for pair in scored.pairs])
    names = sorted(set(sources) - {""})
    return {name: scored.accuracy(np.flatnonzero(sources == name)) for name in names}


def _calibration(scored: ScoredPairs, temperature: float) -> dict[str, Any]:
    """Return the calibration at ``temperature`` and at the fitted temperature.

    The key ``temperature`` of the result is the fitted temperature with its interval; None if there
    is no interval, see `temperature_interval`.
    """
    fitted = temperature_interval(scored.margins, scored.groups)
    return {
        "as_given": asdict(calibration_metrics(scored.margins, temperature=temperature)),
        "fitted": asdict(calibration_metrics(scored.margins, temperature=fitted.value)),
        "temperature": None
        if fitted.needs
        else {"value": fitted.value, "low": fitted.low, "high": fitted.high},
    }


def _length_dependence(scored: ScoredPairs) -> dict[str, Any]:
    """Return correlations of score and length, and the accuracy on replies of similar length.

    The correlations are nan if all lengths or scores are equal. The accuracy is None if no pair has
    replies of similar length.
    """
    lengths = np.array([pair.lengths for pair in scored.pairs], dtype=float)
    size = np.concatenate([lengths[:, 0], lengths[:, 1]])
    values = np.concatenate([scored.chosen, scored.rejected])
    gap = np.abs(lengths[:, 0] - lengths[:, 1]) / np.maximum(lengths.max(1), 1)
    matched = np.flatnonzero(gap <= _MAX_MATCHED_GAP)
    groups = 2 * scored.groups
    interval = jackknife(lambda rows: spearman(values[rows], size[rows]), groups, scale="fisher")
    if abs(interval.value) > 1 - 1e-9:  # the jackknife fails; use the interval of a proportion
        units, sign = len(set(groups)), math.copysign(1.0, interval.value)
        interval = share_of(units, units).scaled(2 * sign, -sign)
    return {
        "pearson": pearson(values, size),
        "spearman": interval.value,
        "spearman_interval": interval_as_dict(interval, len(values)),
        "margin_spearman": spearman(scored.margins, lengths[:, 0] - lengths[:, 1]),
        "matched_accuracy": scored.accuracy(matched) if len(matched) else None,
    }


def _fitted_annotator(scored: ScoredPairs) -> dict[str, Any]:
    """Fit a model that predicts the labels from score and length, with `fit_annotator`.

    Returns:
        ``weights`` and ``noise`` with intervals. If the model cannot be fitted, the result has only
        the key ``not_fitted`` with the reason.
    """
    gap = baselines.length_differences(scored.pairs)
    features = {"score": scored.margins} | ({"length": gap} if np.ptp(gap) else {})
    try:
        fit = fit_annotator(features, groups=scored.groups)
    except ValueError as reason:
        return {"not_fitted": str(reason)}
    weights = {name: vars(estimate) for name, estimate in fit.weights.items()}
    return {"weights": weights, "noise": vars(fit.noise)}


def _batch_dependence(
    reward: Reward, pairs: Sequence[Pair], *, score_std: float
) -> dict[str, float | int] | None:
    """Return the largest changes of a score between scoring a chosen reply alone and in a batch.

    ``batch`` is the change in a batch of all texts. ``order`` is the change in this batch in
    reverse order. ``padding`` is the change if the batch also contains the conversation with the
    longest reply, with this reply repeated eight times. ``largest_difference`` is the maximum of
    the three changes, ``share`` is this maximum divided by ``score_std``, and ``texts`` is the
    number of texts. The result is None if there are no pairs.
    """
    if not pairs:
        return None
    conversations = [pair.chosen for pair in pairs]
    alone = np.array([reward([conversation])[0] for conversation in conversations], dtype=float)
    *head, last = max(conversations, key=lambda c: len(c[-1]["content"]))
    long = [*head, {**last, "content": " ".join([last["content"]] * 8)}]
    batched = {
        "batch": reward(conversations),
        "order": reward(conversations[::-1])[::-1],
        "padding": reward([*conversations, long])[:-1],
    }
    gaps = {}
    for kind, values in batched.items():
        changes = np.abs(np.array(values, dtype=float) - alone)
        gaps[kind] = max(changes[~np.isnan(changes)], default=math.nan)
    largest = max(gaps.values())
    share = largest / score_std if score_std > 0 else (math.inf if largest > 0 else 0.0)
    return {**gaps, "largest_difference": largest, "share": share, "texts": len(conversations)}


def _to_json_values(value: Any) -> Any:
    """Convert nested values to plain Python values; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(k): _to_json_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_values(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
