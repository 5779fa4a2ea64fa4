"""Compare two methods by paired differences, with an interval and a sign-flip test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rlhf.evaluation.metrics import COUNT_METRICS, UnitName, binary_values
from rlhf.evaluation.shared_error import ReferenceUncertainty, fewest_seeds_to_see_failed_run
from rlhf.stats import Interval, sign_flip_test
from rlhf.stats.means import SKEW_CORRECTED_T
from rlhf.stats.paired import delta_interval, paired_deltas
from rlhf.stats.power import sample_size, simulated_coverage
from rlhf.stats.shares import adjusted_wald_bounds

Unit = Literal["training seeds"] | UnitName

FEWEST_SEEDS = 5
"""Minimum number of training seeds for declaring one method better than another."""

LOWER_IS_BETTER = frozenset(
    {"cost", "invalid", "turns", "tokens", "seconds", "length_limited", "loss", "perplexity"}
)
"""Metrics for which lower values are better."""
_MAX_SUGGESTED_PAIRS = 10_000
"""Larger sample sizes are not suggested."""
_ROUNDING = 1e-9
"""Largest rounding error of a difference of two outcomes, as a fraction of their span."""
_FEWEST_RESAMPLED = 20
"""Minimum number of differences for which coverage is simulated by resampling them."""


@dataclass(frozen=True)
class Difference:
    """Paired difference between one method and the baseline."""

    method: str
    baseline: str
    env: str
    decoding: str
    unit: Unit
    """Independent unit: each training seed, prompt, start state or episode gives one pair."""
    estimate: Interval
    """Mean of method - baseline with its 95% interval, without correction for multiple
    comparisons."""
    winner: str | None
    """Name of the method that is significantly better; None if there is no winner."""
    verdict: str
    """The result of the comparison in words."""
    p_value: float
    """Two-sided p value of the sign-flip test, increased by a shared error. `_PairedTest` describes
    how the winner is determined."""
    coverage_normal: float | None
    """Simulated coverage of the interval for n normally distributed differences, where n is the
    number of pairs; None if it was not simulated."""
    coverage_observed: float | None
    """Simulated coverage of the interval for n values resampled from the observed differences; None
    if it was not simulated or n < 20."""


@dataclass(frozen=True)
class _PairedTest:
    """Test of paired differences, for `compare_means`.

    A winner needs at least `FEWEST_SEEDS` training seeds of each method if the units are training
    seeds. If one of the two is a reference policy, the other one needs
    `fewest_seeds_to_see_failed_run` of them.

    The sign-flip test is used if there are enough pairs for its p value to reach `level`. With
    fewer pairs of prompts, start states or episodes, the difference is not significant. With fewer
    pairs of training seeds, Student's t test is used instead. The t test requires at least five
    training seeds, and differences that have the same sign and are not all equal. It is adequate
    because the value of a training seed is a mean over many episodes.
    """

    deltas: np.ndarray
    """Difference method - baseline for each unit, [n]."""
    unit: Unit
    level: float
    """Significance level."""
    fewest_runs: int
    """Smallest number of training runs of a method; reference policies are not counted."""
    p_value: float
    """Two-sided p value of the sign-flip test, increased by the shared error."""
    shared_error: ReferenceUncertainty | None = None
    """Error that all differences have in common, that of the single evaluation of a reference
    policy; None if there is none."""
    excludes_zero: bool = True
    """Result of `_zero_is_outside_interval_with_shared_error`."""

    @property
    def n(self) -> int:
        """Number of pairs."""
        return self.deltas.size

    @property
    def fewest_runs_for_winner(self) -> int:
        """Minimum number of training seeds of each method that is not a reference policy."""
        return fewest_seeds_to_see_failed_run(self.level) if self.shared_error else FEWEST_SEEDS

    @property
    def too_few_runs(self) -> bool:
        """Whether the units are training seeds and a method has too few runs for a winner."""
        return self.unit == "training seeds" and self.fewest_runs < self.fewest_runs_for_winner

    @property
    def same_sign(self) -> bool:
        """Whether all differences have the same sign."""
        return abs(np.sign(self.deltas).sum()) == self.n

    @property
    def significant_given_enough_runs(self) -> bool:
        """Whether the mean difference is significant at `level`.

        With a shared error, an interval that is corrected for skewness must also exclude 0, because
        the values of the training seeds and of the reference evaluation may be skewed.
        """
        if not self.excludes_zero:
            return False
        if self.n >= fewest_pairs_for_significance(self.level) or self.unit != "training seeds":
            return self.p_value <= self.level
        if self.n < FEWEST_SEEDS or not self.same_sign:
            return False
        spread = float(self.deltas.std(ddof=1))
        # Student's t is undefined if all differences are equal.
        if spread <= 1e-9 * float(np.abs(self.deltas).max()):
            return False
        t = float(np.abs(self.deltas.mean())) / spread * math.sqrt(self.n)
        p_value = 2 * float(special.stdtr(self.n - 1, -t))
        return _p_value_with_shared_error(p_value, self.deltas, self.shared_error) <= self.level


def compare_means(
    values: Sequence[float] | np.ndarray,
    baseline_values: Sequence[float] | np.ndarray,
    *,
    method: str,
    baseline: str,
    unit: Unit,
    env: str = "",
    decoding: str = "",
    metric: str = "return",
    comparisons: int = 1,
    fewest_runs: int | None = None,
    span: float | None = None,
    shared_differences: ArrayLike | None = None,
    measure_coverage: bool = True,
) -> Difference:
    """Compare the values of `method` with the paired values of `baseline`.

    The significance level is 0.05 / `comparisons` (Bonferroni), so the family-wise error rate is at
    most 5%. A winner is declared if the difference is significant at this level and there are
    enough training runs, as `_PairedTest` describes. With `shared_differences`, one of the two is a
    reference policy.

    Args:
        values: Value of `method` for each unit, [n].
        baseline_values: Value of `baseline` for each unit in the same order, [n].
        method: Name of the method.
        baseline: Name of the baseline.
        unit: Name of the units.
        env: Name of the environment, copied into the result.
        decoding: Decoding of the policies, copied into the result.
        metric: Name of the metric. Lower values are better if it is in `LOWER_IS_BETTER`.
        comparisons: Number of comparisons, including this one.
        fewest_runs: Smallest number of training runs of a method, without reference policies; by
            default n. With one run, the variation of this method between training seeds is unknown.
        span: Difference between the two possible values of a binary metric; inferred if None.
        shared_differences: Difference of each unit of the single evaluation of a reference policy,
            averaged over the training seeds, [units].
        measure_coverage: Whether to simulate the coverage of the interval.

    Raises:
        ValueError: The lengths differ, there are no values, or some values are not finite.
    """
    deltas = paired_deltas(values, baseline_values)
    span = span or _binary_span(metric, [*values, *baseline_values])
    runs = deltas.size if fewest_runs is None else min(deltas.size, fewest_runs)
    shared_error = None
    if shared_differences is not None:
        shared_error = ReferenceUncertainty.from_unit_differences(shared_differences, span)
    is_count, level = metric in COUNT_METRICS, 0.05 / comparisons
    estimate = _difference_interval(deltas, is_count, span, shared_error)
    test = _paired_test(deltas, unit, level, runs, is_count, span, shared_error)
    leader = method if (deltas.mean() > 0) != (metric in LOWER_IS_BETTER) else baseline
    winner = leader if test.significant_given_enough_runs and not test.too_few_runs else None
    verdict = _result_text(test, method, baseline, leader)
    simulated = measure_coverage and not shared_error
    coverage = _normal_and_observed_coverage(deltas, estimate, span) if simulated else (None, None)
    return Difference(
        method, baseline, env, decoding, unit, estimate, winner, verdict, test.p_value, *coverage
    )


def first_method_wins(deltas: np.ndarray, *, comparisons: int = 1) -> bool:
    """Return whether `compare_means` declares the first of two trained methods the winner.

    Args:
        deltas: Paired difference first - second of each training seed, [n].
        comparisons: Number of comparisons, including this one, for the Bonferroni correction.
    """
    level = 0.05 / comparisons
    test = _PairedTest(deltas, "training seeds", level, deltas.size, sign_flip_test(deltas))
    return bool(deltas.mean() > 0) and test.significant_given_enough_runs and not test.too_few_runs


def _paired_test(
    deltas: np.ndarray,
    unit: Unit,
    level: float,
    runs: int,
    is_count: bool,
    span: float | None,
    shared_error: ReferenceUncertainty | None,
) -> _PairedTest:
    """Return the test of the differences `deltas`, with the shared error, if any."""
    p_value = _p_value_with_shared_error(sign_flip_test(deltas), deltas, shared_error)
    excludes_zero = _zero_is_outside_interval_with_shared_error(
        deltas, is_count, span, shared_error, level
    )
    return _PairedTest(deltas, unit, level, runs, p_value, shared_error, excludes_zero)


def _binary_span(metric: str, values: Sequence[float]) -> float | None:
    """Return the difference between the two possible values of a metric; None if not binary."""
    outcomes = binary_values(metric, values)
    return outcomes[1] - outcomes[0] if outcomes else None


def _difference_interval(
    deltas: np.ndarray,
    is_count: bool,
    span: float | None,
    shared_error: ReferenceUncertainty | None,
    level: float = 0.95,
) -> Interval:
    """Return the interval of a mean difference, widened by the shared error, if any.

    With the `span` of a binary metric, the interval is that of the kind "share".
    """
    if span:
        # Differences of outcomes such as 0.5 and 0.6 are multiples of the span only up to rounding.
        shares, whole = deltas / span, np.rint(deltas / span)
        shares = np.where(np.abs(shares - whole) < _ROUNDING, whole, shares)
        estimate = delta_interval(shares, kind="share", level=level).scaled(span)
    else:
        estimate = delta_interval(deltas, kind="count" if is_count else "mean", level=level)
    return shared_error.widened_interval(estimate, deltas, level) if shared_error else estimate


def _zero_is_outside_interval_with_shared_error(
    deltas: np.ndarray,
    is_count: bool,
    span: float | None,
    shared_error: ReferenceUncertainty | None,
    significance_level: float,
) -> bool:
    """Return whether the interval that is widened by the shared error excludes 0.

    The result is True without a shared error. The confidence level of the interval exceeds
    1 - `significance_level`, see `confidence_level_of_stricter_test`.
    """
    if shared_error is None:
        return True
    confidence = shared_error.confidence_level_of_stricter_test(significance_level)
    interval = _difference_interval(deltas, is_count, span, shared_error, confidence)
    return interval.low > 0 or interval.high < 0


def _p_value_with_shared_error(
    p_value: float, deltas: np.ndarray, shared_error: ReferenceUncertainty | None
) -> float:
    """Return the p value of the mean of `deltas` [n], increased by the shared error, if any."""
    return shared_error.increased_p_value(p_value, deltas) if shared_error else p_value


def fewest_pairs_for_significance(level: float = 0.05) -> int:
    """Return the smallest number of pairs for which the sign-flip test can reach p <= `level`."""
    return math.ceil(math.log2(2 / level))


def _result_text(test: _PairedTest, method: str, baseline: str, leader: str) -> str:
    """Return the result of a test in words; `leader` is the method with the better mean."""
    n, unit, needed = test.n, test.unit, fewest_pairs_for_significance(test.level)
    other = baseline if leader == method else method
    no_winner = f"no winner between {method} and {baseline}: the difference is not significant"
    if not test.deltas.any():
        return f"{method} and {baseline} have equal values in every pair"
    if n == 1:
        one = f"one {unit.removesuffix('s')}"
        return f"no result: {one} is not enough to compare {method} with {baseline}"
    if test.too_few_runs:
        if not test.significant_given_enough_runs and not test.same_sign:
            return no_winner
        runs = test.fewest_runs
        of_each = "" if test.shared_error else " of each"
        number = "a single run of one method is" if runs == 1 else f"{runs} training seeds are"
        return (
            f"{leader} has the better mean in these runs, but {number} not enough to call it "
            f"better than {other} (at least {test.fewest_runs_for_winner} seeds{of_each})"
        )
    if not test.significant_given_enough_runs and n < needed:
        return (
            f"no result: {n} {unit} are not enough to compare {method} with {baseline} "
            f"(at least {needed})"
        )
    if not test.significant_given_enough_runs:
        # More pairs do not reduce the shared error.
        return no_winner + ("" if test.shared_error else _sample_size_hint(test))
    p_value = f"p = {test.p_value:.2g}" if test.p_value >= 1e-4 else "p < 0.0001"
    if unit != "training seeds":
        return (
            f"{leader} is better than {other} on these {unit} "
            f"(one policy of each method; sign-flip test, {p_value})"
        )
    sign_flip = f", sign-flip test, {p_value}" if n >= needed else ""
    return f"{leader} is significantly better than {other} (95%, {n} training seeds{sign_flip})"


def _sample_size_hint(test: _PairedTest) -> str:
    """Return text on the number of pairs with which `test` detects the observed difference.

    The text is empty if this number would be very large, or if all differences are equal.
    """
    mean, sd = float(test.deltas.mean()), float(test.deltas.std(ddof=1))
    # Far above the limit, the number is not computed.
    if sd == 0 or abs(mean) < sd / math.sqrt(_MAX_SUGGESTED_PAIRS):
        return ""
    pairs = sample_size(mean, seed_sd=sd, level=1 - test.level).seeds
    if pairs > _MAX_SUGGESTED_PAIRS:
        return ""
    return f"; detecting a difference of this size needs about {pairs} {test.unit}"


def _normal_and_observed_coverage(
    deltas: np.ndarray, estimate: Interval, span: float | None
) -> tuple[float | None, float | None]:
    """Return `coverage_normal` and `coverage_observed` of `Difference`."""
    n = deltas.size
    if not estimate.known:
        return None, None
    trials = max(100, min(2000, 1_000_000 // n))
    normal = _simulated_normal_coverage(n, trials) if estimate.method == SKEW_CORRECTED_T else None
    if n < _FEWEST_RESAMPLED or not deltas.std():
        return normal, None
    rng = np.random.default_rng(0)
    if estimate.method == SKEW_CORRECTED_T:
        return normal, simulated_coverage(deltas, n, rng=rng, trials=trials)
    drawn = rng.choice(deltas / (span or 1.0), size=(trials, n))
    gains, losses = np.maximum(drawn, 0).sum(axis=1), np.maximum(-drawn, 0).sum(axis=1)
    low, high = adjusted_wald_bounds(gains, losses, n)
    truth = float(deltas.mean()) / (span or 1.0)
    return None, float(((low <= truth) & (truth <= high)).mean())


@lru_cache(maxsize=256)
def _simulated_normal_coverage(n: int, trials: int) -> float:
    """Return the simulated coverage of the interval of a mean of n normally distributed values."""
    rng = np.random.default_rng(0)
    return simulated_coverage(rng.normal(size=50_000), n, rng=rng, trials=trials)
