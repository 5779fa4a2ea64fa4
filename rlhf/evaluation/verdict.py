"""From paired values to a sentence: who is better, or why nobody can be named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import special

from rlhf.evaluation.planning import plan, redrawn_coverage
from rlhf.stats import Interval, adjusted_wald, sign_flip_test
from rlhf.stats.means import CORRECTED
from rlhf.stats.paired import delta_interval

Unit = Literal["training seeds", "prompts", "start states", "episodes"]

FEWEST_SEEDS = 5
"""Training seeds below which no method is called better than another."""

LOWER_IS_BETTER = frozenset(
    {"cost", "invalid", "turns", "tokens", "seconds", "cut", "loss", "perplexity"}
)
_LARGEST_PLAN = 10_000
_FEWEST_REDRAWN = 20
"""Redrawing a handful of values measures the redrawing, not the interval."""


@dataclass(frozen=True)
class Difference:
    """One arm against the baseline on the same units."""

    arm: str
    baseline: str
    env: str
    decoding: str
    unit: Unit
    estimate: Interval
    """arm - baseline with its ordinary 95% interval; n counts pairs of `unit`."""
    winner: str | None
    verdict: str
    p_value: float
    """Of the exact sign-flip test, which names the winner."""
    coverage_normal: float | None
    """Measured coverage of this interval at this n for normal differences."""
    coverage_observed: float | None
    """The same for values redrawn from the observed differences; None for fewer than 20."""


def judge(
    values: Sequence[float] | np.ndarray,
    against: Sequence[float] | np.ndarray,
    *,
    arm: str,
    baseline: str,
    unit: Unit,
    env: str = "",
    decoding: str = "",
    metric: str = "return",
    comparisons: int = 1,
    fewest_runs: int | None = None,
    span: float | None = None,
    measure_coverage: bool = True,
) -> Difference:
    """Compare values [n] of `arm` with the paired values [n] of `baseline`, one for each unit.

    A winner is named where the exact sign-flip test gives p <= 0.05 / `comparisons` (Bonferroni):
    all comparisons with one baseline together name a wrong winner in at most 5% of cases. At
    5% that needs six pairs. Where there are fewer pairs than the test could ever reach the level
    with, episodes and prompts have no winner. Five or more training seeds, each the mean of many
    episodes, are then judged by Student's t, if every seed has the same sign and they differ.

    Args:
        values: one for each unit.
        against: of the baseline, in the same order.
        arm: name of the one side.
        baseline: name of the other.
        unit: what a pair is.
        env: of both.
        decoding: of both.
        metric: name of the metric, which says whether lower is better.
        comparisons: how many there are with this baseline.
        fewest_runs: training runs of the side that has fewer (by default n): one run paired with
            five says nothing of the noise of its own training.
        span: largest minus smallest possible value, where the outcome has but two; 0 and 1 need
            not be told.
        measure_coverage: whether to simulate how often such an interval contains the truth.
    """
    left, right = np.asarray(values, dtype=float), np.asarray(against, dtype=float)
    if left.shape != right.shape or left.ndim != 1 or left.size == 0:
        raise ValueError(f"paired values need equal lengths, got {left.size} and {right.size}")
    deltas = left - right
    if span is None and np.isin([left, right], (0.0, 1.0)).all():
        span = 1.0
    estimate = _estimate(deltas, span)
    p_value = sign_flip_test(deltas)
    level = 0.05 / comparisons
    runs = estimate.n if fewest_runs is None else min(estimate.n, fewest_runs)
    ahead = _leader(deltas, arm, baseline, metric)
    found = _decide(deltas, p_value, level, unit)
    few = unit == "training seeds" and runs < FEWEST_SEEDS
    winner = ahead if found and not few else None
    normal, observed = _coverage(deltas, estimate, span) if measure_coverage else (None, None)
    return Difference(
        arm=arm,
        baseline=baseline,
        env=env,
        decoding=decoding,
        unit=unit,
        estimate=estimate,
        winner=winner,
        verdict=_words(deltas, p_value, level, ahead, (arm, baseline), unit, runs, found=found),
        p_value=p_value,
        coverage_normal=normal,
        coverage_observed=observed,
    )


def fewest_pairs(level: float = 0.05) -> int:
    """Pairs from which the sign-flip test can reach a level: 2 / 2^n <= `level`."""
    return math.ceil(math.log2(2 / level))


def _estimate(deltas: np.ndarray, span: float | None) -> Interval:
    if span:
        return delta_interval(deltas / span, kind="share").scaled(span)
    return delta_interval(deltas, kind="mean")


def _decide(deltas: np.ndarray, p_value: float, level: float, unit: Unit) -> bool:
    """Whether the differences are beyond noise at a level."""
    if deltas.size >= fewest_pairs(level) or unit != "training seeds":
        return p_value <= level
    if deltas.size < FEWEST_SEEDS or abs(np.sign(deltas).sum()) < deltas.size:
        return False
    spread = float(deltas.std(ddof=1))
    # Equal differences have no spread to be judged by, whatever their size is.
    if spread <= 1e-9 * float(np.abs(deltas).max()):
        return False
    t = float(np.abs(deltas.mean())) / spread * math.sqrt(deltas.size)
    return 2 * float(special.stdtr(deltas.size - 1, -t)) <= level


def _leader(deltas: np.ndarray, arm: str, baseline: str, metric: str) -> str:
    return arm if (deltas.mean() > 0) != (metric in LOWER_IS_BETTER) else baseline


def _words(
    deltas: np.ndarray,
    p_value: float,
    level: float,
    ahead: str,
    names: tuple[str, str],
    unit: Unit,
    runs: int,
    *,
    found: bool,
) -> str:
    n, (arm, baseline) = deltas.size, names
    behind = baseline if ahead == arm else arm
    if not deltas.any():
        return f"{arm} and {baseline} are identical on every pair"
    if n == 1:
        return f"no verdict: one pair of {unit} gives no interval"
    if unit == "training seeds" and runs < FEWEST_SEEDS:
        if found or abs(np.sign(deltas).sum()) == n:
            return (
                f"{ahead} leads in these runs, but {_counted(runs)} too few to call it better than "
                f"{behind} (at least {FEWEST_SEEDS} of each)"
            )
        return f"no winner between {arm} and {baseline}: the difference lies inside the noise"
    if not found and n < fewest_pairs(level):
        return (
            f"no verdict: {n} {unit} are too few to tell {arm} from {baseline} "
            f"(at least {fewest_pairs(level)})"
        )
    if not found:
        return (
            f"no winner between {arm} and {baseline}: the difference lies inside the noise"
            f"{_hint(deltas, unit)}"
        )
    if unit != "training seeds":
        return (
            f"{ahead} is better than {behind} on these {unit} "
            f"(one trained model each; {_p_words(p_value)})"
        )
    sure = f", {_p_words(p_value)}" if n >= fewest_pairs(level) else ""
    return f"{ahead} is significantly better than {behind} (95%, {n} training seeds{sure})"


def _p_words(p_value: float) -> str:
    shown = f"p = {p_value:.2g}" if p_value >= 1e-4 else "p < 0.0001"
    return f"sign-flip test, {shown}"


def _counted(runs: int) -> str:
    return "a single run of one side is" if runs == 1 else f"{runs} training seeds are"


def _hint(deltas: np.ndarray, unit: Unit) -> str:
    """How many pairs would find a difference as large as the one seen."""
    mean, sd = float(deltas.mean()), float(deltas.std(ddof=1))
    if sd == 0 or abs(mean) < 4 * sd / math.sqrt(_LARGEST_PLAN):
        return ""
    return f"; one of this size needs about {plan(mean, seed_sd=sd).seeds} {unit}"


def _coverage(
    deltas: np.ndarray, estimate: Interval, span: float | None
) -> tuple[float | None, float | None]:
    """Measured coverage for normal differences and for redrawn ones, where they mean something."""
    n = deltas.size
    if not estimate.known:
        return None, None
    trials = max(100, min(2000, 1_000_000 // n))
    normal = _normal_coverage(n, trials) if estimate.method == CORRECTED else None
    if n < _FEWEST_REDRAWN or not deltas.std():
        return normal, None
    rng = np.random.default_rng(0)
    if estimate.method == CORRECTED:
        return normal, redrawn_coverage(deltas, n, rng=rng, trials=trials)
    drawn = rng.choice(deltas / (span or 1.0), size=(trials, n))
    gains, losses = np.maximum(drawn, 0).sum(axis=1), np.maximum(-drawn, 0).sum(axis=1)
    low, high = adjusted_wald(gains, losses, n)
    truth = float(deltas.mean()) / (span or 1.0)
    return None, float(((low <= truth) & (truth <= high)).mean())


@lru_cache(maxsize=256)
def _normal_coverage(n: int, trials: int) -> float:
    rng = np.random.default_rng(0)
    return redrawn_coverage(rng.normal(size=50_000), n, rng=rng, trials=trials)
