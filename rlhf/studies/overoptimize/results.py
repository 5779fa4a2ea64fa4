"""Compute the results of an overoptimization study as plain data: curves, fits, peaks, advice."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.common.numbers import centered_moving_average
from rlhf.reports.overoptimization import PROXY_NAMES
from rlhf.reward_models.ensemble import ScoreCombination
from rlhf.stats import Interval, interval, unit_means
from rlhf.studies.overoptimize.fits import (
    OveroptimizationFit,
    best_of_n_kl_bound,
    best_of_n_scores,
    fit_best_of_n,
    fit_curve,
)

CURVE_POINTS = 60
"""Number of points of a fitted curve."""
SMOOTHING_FRACTION = 0.1
"""Length of the moving average that smooths gold to find its peak, as a fraction of the steps."""


@dataclass(frozen=True)
class TrainingTrack:
    """Logged values of one training run at each step; all lists have the same length."""

    steps: list[int]
    kl: list[float]
    """KL to the initial policy, in nats per episode."""
    proxy: list[float]
    """Mean proxy score of the episodes."""
    gold: list[float]
    """Mean gold score of the episodes."""


def best_of_n_result(
    name: str,
    standardized_proxy: np.ndarray,
    gold: np.ndarray,
    units: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Return the proxy and gold scores of best-of-n, the fit and its advice.

    The values of n are the powers of two below the number of samples, and this number.

    Args:
        name: Name of the proxy.
        standardized_proxy: Standardized proxy scores [members, prompts, samples]; the curves are
            averaged over the members.
        gold: Gold scores [prompts, samples].
        units: Independent unit of each row of `gold`, [prompts]; rows of one prompt have the same
            unit. By default, each row is a unit.
    """
    ns = powers_of_two_and_limit(gold.shape[1])
    proxy_scores, gold_scores = (
        _unit_mean_rows(best_of_n_scores(standardized_proxy, scores, ns), units)
        for scores in (standardized_proxy, gold)
    )
    fit = fit_best_of_n(gold_scores, ns)
    return {
        "proxy": name,
        "ns": ns,
        "kl": [best_of_n_kl_bound(n) for n in ns],
        "proxy_score": _column_mean_intervals(proxy_scores),
        "gold": _column_mean_intervals(gold_scores),
        "gain": interval(gold_scores[:, -1] - gold_scores[:, 0], kind="mean").as_dict(),
        "fit": fit_as_dict(fit),
        "advice": _best_of_n_advice(fit, ns),
    }


def combined_proxy_scores(member_scores: np.ndarray, *, penalty: float) -> dict[str, np.ndarray]:
    """Return the proxy scores for each way of combining the members of an ensemble.

    Args:
        member_scores: Scores of the members, [members, prompts, samples].
        penalty: Weight of the variance for the combination "uncertainty".

    Returns:
        "single" -> `member_scores`. If there are several members, also "mean", "worst" and
        "uncertainty" -> combined scores [1, prompts, samples].
    """
    ways = {"single": member_scores}
    if len(member_scores) > 1:
        flat = member_scores.reshape(len(member_scores), -1).tolist()
        for how in ("mean", "worst", "uncertainty"):
            values, _ = ScoreCombination(how, penalty)(flat)
            ways[how] = np.array(values, dtype=float).reshape(member_scores.shape[1:])[None]
    return ways


def _unit_mean_rows(scores: np.ndarray, units: Sequence[Hashable] | None) -> np.ndarray:
    """Return the mean over the rows of each unit, [units, columns].

    The result is ``scores``, [prompts, columns], if ``units`` is None.
    """
    if units is None:
        return scores
    return np.stack([unit_means(column, units)[1] for column in scores.T], axis=-1)


def _column_mean_intervals(scores: np.ndarray) -> list[dict[str, Any]]:
    """Return the mean of each column of scores [units, columns], with its interval over units."""
    return [interval(column, kind="mean").as_dict() for column in scores.T]


def powers_of_two_and_limit(limit: int) -> list[int]:
    """Return the powers of two below ``limit``, and ``limit`` itself, in ascending order."""
    return sorted({2**k for k in range(limit.bit_length()) if 2**k <= limit} | {limit})


def _best_of_n_advice(fit: OveroptimizationFit, ns: Sequence[int]) -> str:
    """Return the advice of the fit, with the largest n up to the peak if gold rises and then falls.

    The KL of n is that of `best_of_n_kl_bound`.
    """
    if not fit.rises_then_falls:
        return fit.advice()
    largest = max((n for n in ns if best_of_n_kl_bound(n) <= fit.peak.value**2), default=1)
    return f"{fit.advice()}: n up to about {largest}"


def rl_result(combination: str, tracks: Sequence[TrainingTrack], *, start: float) -> dict[str, Any]:
    """Return the training curves, the fit, the observed peak and the changes after the peak.

    Args:
        combination: How the members of the proxy were combined, a key of
            `combined_proxy_scores`.
        tracks: One track for each training seed; all are truncated to the length of the shortest.
        start: Mean gold score of the initial policy.
    """
    length = min(len(track.steps) for track in tracks)
    kl = np.array([track.kl[:length] for track in tracks])  # [seeds, steps]
    gold = np.array([track.gold[:length] for track in tracks])
    proxy = np.array([track.proxy[:length] for track in tracks])
    width = max(1, round(SMOOTHING_FRACTION * length))
    best, distance, height = peak_step_distance_and_gold(kl, gold, width)
    changes = {
        "gold_after": _change_after_peak(gold, gold, width),
        "proxy_after": _change_after_peak(proxy, gold, width),
    }
    result: dict[str, Any] = {
        "how": combination,
        "seeds": len(tracks),
        "steps": tracks[0].steps[:length],
        "kl": np.maximum(kl.mean(0), 0).tolist(),
        "proxy_score": _column_mean_intervals(proxy),
        "gold": _column_mean_intervals(gold),
        "observed": {
            "step": tracks[0].steps[best],
            "distance": _range_of_peaks(kl, gold, width).as_dict(),
            "gold": height,
            **{name: interval(change, kind="mean").as_dict() for name, change in changes.items()},
        },
        "fit": None,
        "falls": False,
        "advice": "no fit: a fit with intervals needs at least 3 seeds",
    }
    if len(tracks) >= 3:
        # Training seeds are the clusters, because the points of one seed are dependent.
        seeds = np.repeat(np.arange(len(tracks)), length)
        fit = fit_curve(kl.ravel(), (gold - start).ravel(), form="rl", clusters=seeds)
        low, high = fit.peak.low, fit.peak.high
        result["fit"] = fit_as_dict(fit)
        result["falls"] = math.isfinite(fit.peak.high)
        result["observed"]["inside"] = bool(low <= distance <= high)
        result["advice"] = _rl_advice(fit, result)
    return result


def peak_step_distance_and_gold(
    kl: np.ndarray, gold: np.ndarray, width: int
) -> tuple[int, float, float]:
    """Return step index, d = sqrt(KL) and gold score of the peak of the mean gold over seeds.

    `kl` and `gold` have the shape [seeds, steps]. Their means over seeds are smoothed by a moving
    average over `width` steps.
    """
    smooth = centered_moving_average(gold.mean(0), width)
    best = int(np.argmax(smooth))
    nats = max(0.0, float(centered_moving_average(kl.mean(0), width)[best]))
    return best, math.sqrt(nats), float(smooth[best])


def _range_of_peaks(kl: np.ndarray, gold: np.ndarray, width: int) -> Interval:
    """Return the distance d of the observed peak, with the range of the peaks of single seeds.

    The bounds of the result are this range and not a confidence interval: the coverage of an
    interval for the argmax of few noisy curves is unknown. With a single seed, the bounds are nan.
    """
    point = peak_step_distance_and_gold(kl, gold, width)[1]
    single = [
        peak_step_distance_and_gold(kl[[row]], gold[[row]], width)[1] for row in range(len(gold))
    ]
    if len(single) == 1:
        return Interval(point, math.nan, math.nan, 1)
    return Interval(point, min(point, *single), max(point, *single), len(single))


def _change_after_peak(values: np.ndarray, gold: np.ndarray, width: int) -> np.ndarray:
    """Return the change of `values` from the peak of gold to the end of training, for each seed.

    If there are several seeds, the peak for a seed is computed from the others. The peak of the
    seed's own curve would partly be a maximum of noise, so that a constant curve would seem to fall
    after it.

    Args:
        values: [seeds, steps].
        gold: [seeds, steps] gold scores that determine the peak.
        width: Number of steps over which values are averaged at the peak and at the end.

    Returns:
        The changes [seeds].
    """
    count, length = gold.shape
    last = slice(length - width, length)
    changes = []
    for row in range(count):
        others = np.delete(gold, row, axis=0) if count > 1 else gold
        best = int(np.argmax(centered_moving_average(others.mean(0), width)))
        around = slice(max(0, best - width // 2), best - width // 2 + width)
        changes.append(values[row, last].mean() - values[row, around].mean())
    return np.array(changes)


def _rl_advice(fit: OveroptimizationFit, result: dict[str, Any]) -> str:
    """Return the advice of the fit, and the first step that reached the KL of its peak, if any."""
    advice = fit.advice()
    if not fit.rises_then_falls:
        return advice
    passed = [
        step
        for step, kl in zip(result["steps"], result["kl"], strict=True)
        if kl >= fit.peak.value**2
    ]
    return f"{advice}; training reached it at step {passed[0]}" if passed else advice


def fit_as_dict(fit: OveroptimizationFit) -> dict[str, Any]:
    """Return a fit as a dictionary for JSON, with points of its curve; infinite values are None."""
    d = np.linspace(0, fit.max_distance, CURVE_POINTS)
    return {
        "form": fit.form,
        "alpha": fit.alpha.as_dict(),
        "beta": fit.beta.as_dict(),
        "peak": fit.peak.as_dict(),
        "furthest": fit.max_distance,
        "curve": {"d": d.tolist(), "gain": fit.predicted_gold_gain(d).tolist()},
    }


def verdict_sentences(results: dict[str, Any]) -> list[str]:
    """Return one sentence for each optimization by RL, and by best-of-n with the first proxy.

    A sentence describes how the gold score changed and recommends when to stop.
    """
    lines = []
    for row in results["rl"]:
        name = f"{results['algorithm']} against {PROXY_NAMES[row['how']]}"
        observed = row["observed"]
        fell, rose = observed["gold_after"], observed["proxy_after"]
        # The peaks of the seeds are computed from overlapping sets of seeds, so the interval may be
        # too narrow. The fit must therefore show a fall too.
        if _interval_has_sign(fell, -1) and row["falls"]:
            also = " while the proxy continued to rise" if _interval_has_sign(rose, 1) else ""
            nats = observed["distance"]["mean"] ** 2
            lines.append(
                f"{name}: gold peaked at step {observed['step']} (KL {nats:.3g}) and "
                f"then fell by {-fell['mean']:.3g}{also}; {row['advice']}."
            )
        else:
            lines.append(
                f"{name}: the data do not show that gold falls after its observed peak; "
                f"{row['advice']}."
            )
    rows = results["best_of_n"]
    for row in (row for row in rows if row["proxy"] == rows[0]["proxy"]):
        first, last = row["gold"][0]["mean"], row["gold"][-1]["mean"]
        name = f"best-of-n by {row['proxy']}, {PROXY_NAMES[row['how']]}"
        lines.append(
            f"{name}: gold {first:.3g} at n = 1, {last:.3g} at n = {row['ns'][-1]}; "
            f"{row['advice']}."
        )
    return lines


def _interval_has_sign(change: dict[str, Any], sign: int) -> bool:
    """Return whether the interval of a change is above 0 (`sign` 1) or below 0 (`sign` -1)."""
    end = change["low"] if sign > 0 else change["high"]
    return end is not None and sign * end > 0
