"""Add the error of a single reference evaluation to differences that all have it in common."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rlhf.stats import Interval
from rlhf.stats.means import (
    SKEW_CORRECTED_T,
    EstimateMoments,
    mean_moments,
    skew_corrected_t_bounds,
)
from rlhf.stats.shares import adjusted_wald_moments
from rlhf.stats.units import no_interval_reason, require_finite_vector, rounded_to_13_digits

FEWEST_SHARED_UNITS = 10
"""Minimum number of units of a reference evaluation with which training seeds are compared."""

_ASSUMED_FAILURE_PROBABILITY = 0.3
"""Assumed probability that a training run fails, see `fewest_seeds_to_see_failed_run`."""

_STRICTER_LEVEL_FACTOR = 0.4
"""Factor of the significance level for the interval that must exclude 0."""


def fewest_seeds_to_see_failed_run(level: float = 0.05) -> int:
    """Return the minimum number of training seeds for a comparison with a reference evaluation.

    The differences of two trained methods are symmetric if the methods are equal, but the
    differences from a fixed reference are as skewed as the values of the seeds. If a run fails with
    a probability of 30%, n seeds do not contain a failed run with a probability of 0.7^n, and then
    look far too similar. This probability is at most `level` for the returned number.
    """
    return math.ceil(math.log(level) / math.log(1 - _ASSUMED_FAILURE_PROBABILITY))


@dataclass(frozen=True)
class ReferenceUncertainty:
    """Error that the differences of all training seeds have in common.

    All seeds are compared with the same evaluation of a reference policy, so more seeds do not
    reduce the error of this evaluation.
    """

    moments: EstimateMoments | None
    """Moments of the mean over the units of the reference evaluation; None if its error is
    unknown."""
    reason: str = ""
    """Why the error is unknown; empty if it is known."""

    @classmethod
    def from_unit_differences(
        cls, differences: ArrayLike, span: float | None
    ) -> ReferenceUncertainty:
        """Return the error of the mean of `differences` [n].

        For binary metrics, whose values differ by at most `span`, the error is that of the adjusted
        Wald interval, which is positive even if all values are equal. `span` is None for other
        metrics. With fewer than `FEWEST_SHARED_UNITS` units, the error is unknown.
        """
        data = rounded_to_13_digits(require_finite_vector(differences))
        if data.size < FEWEST_SHARED_UNITS:
            units = "1 unit" if data.size == 1 else f"{data.size} units"
            return cls(None, f"{units}, a reference needs {FEWEST_SHARED_UNITS}")
        if span is None:
            reason = no_interval_reason(data)
            return cls(None if reason else mean_moments(data), reason)
        gains, losses = data[data > 0].sum() / span, -data[data < 0].sum() / span
        adjusted = adjusted_wald_moments(gains, losses, data.size)
        return cls(adjusted._replace(mean=data.mean(), error=span * adjusted.error))

    def widened_interval(self, estimate: Interval, deltas: np.ndarray, level: float) -> Interval:
        """Return the interval of the mean difference, with the additional error.

        `estimate` is the interval of the mean of `deltas` [n] without this error, at the confidence
        level `level`. The result has no bounds if there are too few training seeds, or if one of
        the two errors is unknown.
        """
        n, needed = deltas.size, fewest_seeds_to_see_failed_run()
        if n < needed:
            reason = f"{n} training seeds, a comparison with a reference needs {needed}"
            return Interval.without_bounds(estimate.value, n, reason)
        if not estimate.known:
            return estimate
        if self.moments is None:
            return Interval.without_bounds(estimate.value, n, f"common error: {self.reason}")
        if estimate.method != SKEW_CORRECTED_T:
            # The variance over seeds is unknown, so the distances to the bounds are combined.
            ends = skew_corrected_t_bounds(self.moments, level=level)
            below, above = (abs(float(end - self.moments.mean)) for end in ends)
            low = estimate.value - math.hypot(estimate.value - estimate.low, below)
            high = estimate.value + math.hypot(estimate.high - estimate.value, above)
            return replace(estimate, low=low, high=high)
        total = _moments_with_both_errors(mean_moments(deltas), self.moments)
        low, high = skew_corrected_t_bounds(total, level=level)
        return replace(estimate, low=float(low), high=float(high), method=SKEW_CORRECTED_T)

    @staticmethod
    def confidence_level_of_stricter_test(significance: float) -> float:
        """Return the confidence level of the interval that must exclude 0.

        It is higher than 1 - `significance`, because the sign-flip test is not exact if the values
        of the training seeds are skewed.
        """
        return 1 - _STRICTER_LEVEL_FACTOR * significance

    def increased_p_value(self, p_value: float, deltas: np.ndarray) -> float:
        """Return the p value of the mean of `deltas` [n], with the additional error.

        `p_value` is the two-sided p value without this error. The t statistic that has this p value
        determines the error without it. If the additional error is unknown, the p value is 1.
        """
        if p_value >= 1 or self.moments is None:
            return 1.0
        mean, freedom = np.abs(deltas.mean()), np.asarray(deltas.size - 1.0)
        error = mean / -special.stdtrit(freedom, p_value / 2)
        total = _moments_with_both_errors(
            EstimateMoments(mean, error, np.zeros(()), freedom), self.moments
        )
        return 2 * float(special.stdtr(total.freedom, -mean / total.error))


def _moments_with_both_errors(
    estimate: EstimateMoments, additional: EstimateMoments
) -> EstimateMoments:
    """Return the moments of a mean whose error is the sum of two independent errors.

    The mean is that of `estimate`. The degrees of freedom are Satterthwaite's.
    """
    first, second = estimate.error**2, additional.error**2
    variance = first + second
    freedom = variance**2 / (first**2 / estimate.freedom + second**2 / additional.freedom)
    third = estimate.skewness * estimate.error**3 + additional.skewness * additional.error**3
    return EstimateMoments(estimate.mean, np.sqrt(variance), third / variance**1.5, freedom)
