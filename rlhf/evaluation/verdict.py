"""From paired values to a sentence: who is better, or why nobody can be named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf.evaluation.distributions import student_quantile
from rlhf.evaluation.planning import plan, t_coverage
from rlhf.evaluation.statistics import Estimate, paired_difference

Unit = Literal["training seeds", "episodes"]

FEWEST_SEEDS = 5
"""Training seeds below which no method is called better than another."""

LOWER_IS_BETTER = frozenset(
    {"cost", "invalid", "turns", "tokens", "seconds", "cut", "loss", "perplexity"}
)
_LARGEST_PLAN = 10_000


@dataclass(frozen=True)
class Difference:
    """One arm against the baseline on the same episodes."""

    arm: str
    baseline: str
    env: str
    decoding: str
    unit: Unit
    estimate: Estimate
    """arm - baseline with its ordinary 95% interval; n counts pairs of `unit`."""
    winner: str | None
    verdict: str
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
) -> Difference:
    """Compare values [n] of `arm` with the paired values [n] of `baseline`.

    `fewest_runs` is the number of training runs of the side that has fewer (by default n): one run
    paired with five says nothing of the noise of its own training.

    The verdict asks an interval at level 1 - 0.05 / `comparisons` (Bonferroni) to exclude 0, so
    that all comparisons with one baseline together name a wrong winner in at most 5% of cases.
    """
    deltas = np.asarray(values, dtype=float) - np.asarray(against, dtype=float)
    estimate = paired_difference(values, against)
    strict = paired_difference(values, against, level=1 - 0.05 / comparisons)
    ahead = _leader(strict, arm, baseline, metric)
    runs = estimate.n if fewest_runs is None else min(estimate.n, fewest_runs)
    named = ahead if unit == "episodes" or runs >= FEWEST_SEEDS else None
    rng = np.random.default_rng(0)
    normal, observed = _coverage(deltas, rng)
    return Difference(
        arm=arm,
        baseline=baseline,
        env=env,
        decoding=decoding,
        unit=unit,
        estimate=estimate,
        winner=named,
        verdict=_words(estimate, ahead, arm, baseline, unit, deltas, runs),
        coverage_normal=normal,
        coverage_observed=observed,
    )


def _leader(strict: Estimate, arm: str, baseline: str, metric: str) -> str | None:
    if not strict.known or strict.low <= 0 <= strict.high:
        return None
    higher = strict.value > 0
    return arm if higher != (metric in LOWER_IS_BETTER) else baseline


def _words(
    estimate: Estimate,
    ahead: str | None,
    arm: str,
    baseline: str,
    unit: Unit,
    deltas: np.ndarray,
    runs: int,
) -> str:
    few = unit == "training seeds" and runs < FEWEST_SEEDS
    if not deltas.any():
        return f"{arm} and {baseline} are identical on every pair"
    if not estimate.known:
        return f"no verdict: one pair of {unit} gives no interval"
    if ahead is None:
        return (
            f"no winner between {arm} and {baseline}: the difference lies inside the noise"
            f"{_hint(estimate, unit)}"
        )
    behind = baseline if ahead == arm else arm
    if few:
        return (
            f"{ahead} leads in these runs, but {_counted(runs)} too few to call it better than "
            f"{behind} (at least {FEWEST_SEEDS} of each)"
        )
    if unit == "episodes":
        return f"{ahead} is better than {behind} on these episodes (one trained model each)"
    return f"{ahead} is significantly better than {behind} (95%, {estimate.n} training seeds)"


def _counted(runs: int) -> str:
    return "a single run of one side is" if runs == 1 else f"{runs} training seeds are"


def _hint(estimate: Estimate, unit: Unit) -> str:
    """How many pairs would find a difference as large as the one seen."""
    quantile = student_quantile(0.975, estimate.n - 1)
    sd = (estimate.high - estimate.value) / quantile * math.sqrt(estimate.n)
    if sd == 0 or abs(estimate.value) < 4 * sd / math.sqrt(_LARGEST_PLAN):
        return ""
    return f"; one of this size needs about {plan(estimate.value, seed_sd=sd).seeds} {unit}"


def _coverage(deltas: np.ndarray, rng: np.random.Generator) -> tuple[float | None, float | None]:
    n = deltas.size
    if n < 2:
        return None, None
    trials = max(200, min(2000, 1_000_000 // n))
    normal = t_coverage(rng.normal(size=50_000), n, rng=rng, trials=trials)
    # Redrawing a handful of values measures the redrawing, not the interval.
    observed = t_coverage(deltas, n, rng=rng, trials=trials) if n >= 20 and deltas.std() else None
    return normal, observed
