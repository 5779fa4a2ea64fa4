"""Fit scaling curves of reward over-optimization (Gao, Schulman & Hilton 2022).

With d = sqrt(KL to the initial policy), the gain in gold score follows
R_bon(d) = d (alpha - beta d) under best-of-n and R_RL(d) = d (alpha - beta log d) under RL
(section 3.1). Both are 0 at d = 0 and linear in alpha and beta, so the least-squares fit
has a closed form.

Each cluster (a training seed or a prompt) is one independent unit. The intervals of alpha and beta
are Student's t intervals of jackknife pseudo-values over clusters. The interval of the peak
contains the distances at which the fitted slope of gold does not differ significantly from 0
(Fieller 1954). It remains valid if beta may be 0; an interval of the ratio of the coefficients
would not, because the ratio has no mean in this case.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from rlhf.stats import Interval, unit_means
from rlhf.stats.samples import best_of_n

Form = Literal["best-of-n", "rl"]

_LARGEST_EXPONENT = 50.0
"""A fitted peak beyond exp(50) is treated as no peak, because no run reaches such a distance."""
_NUM_TESTED_DISTANCES = 2001
"""Number of distances at which the slope is tested; their spacing is 1/2000 of the range."""


@dataclass(frozen=True)
class OveroptimizationFit:
    """Fitted coefficients and the predicted peak, with intervals."""

    form: Form
    """Form of the curve: R_bon ("best-of-n") or R_RL ("rl")."""
    alpha: Interval
    beta: Interval
    peak: Interval
    """Distance d = sqrt(KL) at which the fitted gold is highest: 0 if it only falls, inf if it only
    rises. The upper bound is inf if the data do not show that gold falls."""
    min_distance: float
    """Smallest measured d above 0."""
    max_distance: float
    """Largest measured d; a peak beyond it is an extrapolation."""
    rise_is_seen: bool = True
    """Whether the measured gold near the peak is significantly above the initial gold. This is
    checked because the fit of R_RL has a peak even if gold only falls: its slope at 0 is
    infinite."""
    fall_is_seen: bool = True
    """Whether the measured gold beyond the peak is significantly below the gold near the peak. This
    is checked because both forms fit a peak to gold that rises and then stays constant."""

    def predicted_gold_gain(self, sqrt_kl: ArrayLike) -> np.ndarray:
        """Return the predicted gain in gold at each sqrt(KL), elementwise."""
        return _regressors(np.asarray(sqrt_kl, dtype=float), self.form) @ [
            self.alpha.value,
            self.beta.value,
        ]

    @property
    def rises_then_falls(self) -> bool:
        """Whether the data show that gold rises and then falls before the largest distance."""
        return self.rise_is_seen and self.fall_is_seen and self._has_fitted_peak

    @property
    def _has_fitted_peak(self) -> bool:
        """Whether the interval of the peak has a lower bound above 0 and a finite upper bound."""
        return self.peak.low > 0 and math.isfinite(self.peak.high)

    def advice(self) -> str:
        """Return a recommendation on when to stop, or why there is none, without a final period.

        KL is in nats.
        """
        kl, reached = self.peak.value**2, self.max_distance**2
        low, high = self.peak.low**2, self.peak.high**2
        if self.rises_then_falls:
            return f"stop near KL {kl:.3g} [{low:.3g}, {high:.3g}], where gold is highest"
        if self.peak.high <= self.min_distance:
            return "gold falls from the start: do not optimize against this proxy"
        if self._has_fitted_peak:
            measured = (
                "beyond it is not significantly lower"
                if self.rise_is_seen
                else "there is not significantly above the initial gold"
            )
            return (
                f"no advice: the fitted curve peaks near KL {kl:.3g}, but the gold measured "
                f"{measured}; measure more"
            )
        if self.peak.low < self.max_distance:
            return (
                "no advice: in the interval of the peak, "
                f"KL [{low:.3g}, {_upper_bound_text(high)}], gold may rise or fall; measure more"
            )
        if math.isfinite(kl):
            return f"gold still rises at KL {reached:.3g}; a peak near KL {kl:.3g} is extrapolated"
        further = "train longer" if self.form == "rl" else "try a larger n"
        return f"no peak: gold still rises at KL {reached:.3g}; {further} and measure again"


def best_of_n_kl_bound(n: int) -> float:
    """Return log n - (n - 1) / n, an upper bound on KL(best of n || policy) in nats."""
    if n < 1:
        raise ValueError(f"best-of-n needs n >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n_scores(proxy: ArrayLike, gold: ArrayLike, ns: Sequence[int]) -> np.ndarray:
    """Return the expected gold score of the sample with the highest proxy score among n.

    The estimates are unbiased.

    Args:
        proxy: Proxy scores [prompts, N], or [proxies, prompts, N] to average over several proxies.
        gold: Gold scores [prompts, N].
        ns: Values of n, each at most N.

    Returns:
        Expected gold scores [prompts, ns].
    """
    ranking, score = np.asarray(proxy, dtype=float), np.asarray(gold, dtype=float)
    if ranking.ndim == 3:
        columns = np.broadcast_to(score, ranking.shape)
        pairs = zip(ranking, columns, strict=True)
        return np.mean([best_of_n_scores(p, g, ns) for p, g in pairs], axis=0)
    if ranking.ndim != 2 or ranking.shape != score.shape:
        shapes = f"{ranking.shape} and {score.shape}"
        raise ValueError(f"need two arrays [prompts, samples], got {shapes}")
    return np.array([[best_of_n(p, g, n) for n in ns] for p, g in zip(ranking, score, strict=True)])


def fit_best_of_n(scores: np.ndarray, ns: Sequence[int]) -> OveroptimizationFit:
    """Fit R_bon to the gain in gold over n = 1.

    The clusters are the prompts, because all n use the same samples of a prompt.

    Args:
        scores: Gold scores from `best_of_n_scores`, [prompts, ns].
        ns: Values of n; the first is 1.
    """
    gains = scores[:, 1:] - scores[:, :1]
    kl = [best_of_n_kl_bound(n) for n in ns[1:]]
    prompts = np.repeat(np.arange(len(gains)), len(kl))
    return fit_curve(np.tile(kl, len(gains)), gains.ravel(), form="best-of-n", clusters=prompts)


def fit_curve(
    kl: ArrayLike,
    gain: ArrayLike,
    *,
    form: Form,
    clusters: Sequence[object] | np.ndarray | None = None,
    level: float = 0.95,
) -> OveroptimizationFit:
    """Return the least-squares fit of the gain in gold, with intervals over clusters.

    Args:
        kl: [n] KL to the initial policy in nats; negative estimates are replaced by 0.
        gain: [n] gold score minus initial gold score.
        form: Form of the curve, "best-of-n" or "rl".
        clusters: [n] independent unit of each point, such as its training seed; by default every
            point is a unit.
        level: Confidence level.

    Raises:
        ValueError: The lengths differ, some values are not finite, or there are fewer than 3
            different clusters or distances.
    """
    d, y = np.sqrt(np.maximum(np.asarray(kl, dtype=float), 0)), np.asarray(gain, dtype=float)
    labels = np.arange(d.size) if clusters is None else np.asarray(clusters)
    _, codes = np.unique(labels, return_inverse=True)
    _require_fittable(d, y, codes)
    squares, products = _normal_equations_by_cluster(_regressors(d, form), y, codes)
    whole = _solve_normal_equations(squares.sum(axis=0), products.sum(axis=0))
    without_one = _solve_normal_equations(
        squares.sum(axis=0) - squares, products.sum(axis=0) - products
    )
    count = len(squares)
    pseudo = count * whole - (count - 1) * without_one  # [clusters, 2]
    covariance = np.cov(pseudo.T) / count
    critical = float(stats.t.ppf(0.5 + level / 2, count - 1))
    reach = critical * np.sqrt(np.diag(covariance))
    alpha, beta = (
        Interval(float(point), float(point - margin), float(point + margin), count)
        for point, margin in zip(whole, reach, strict=True)
    )
    ends = float(d[d > 0].min()), float(d.max())
    peak = _peak_interval(whole, critical**2 * covariance, form, count, *ends)
    rise = _gold_rise_is_significant(d, y, codes, peak, level)
    fall = _gold_fall_is_significant(d, y, codes, peak.value, level)
    return OveroptimizationFit(form, alpha, beta, peak, *ends, rise, fall)


def _gold_rise_is_significant(
    sqrt_kl: np.ndarray, gains: np.ndarray, codes: np.ndarray, peak: Interval, level: float
) -> bool:
    """Return whether the gold `gains` near the peak are significantly above 0.

    The test is Student's t test over clusters.
    """
    # The curve is flat near its peak: most of the gain is reached at half of the distance.
    near = (sqrt_kl >= min(peak.low, peak.value / 2)) & (
        sqrt_kl <= max(peak.high, 1.5 * peak.value)
    )
    values = [*_cluster_means(gains, codes, near).values()]
    if len(values) < 3:
        return False
    test: Any = stats.ttest_1samp(values, 0, alternative="greater")
    return bool(test.pvalue < (1 - level) / 2)


def _gold_fall_is_significant(
    sqrt_kl: np.ndarray, gains: np.ndarray, codes: np.ndarray, peak: float, level: float
) -> bool:
    """Return whether gold beyond the peak is significantly below gold near the peak.

    The test is a paired t test over the clusters that have points in both ranges. It is Welch's t
    test if there are fewer than 3 such clusters.
    """
    margin = min(peak, sqrt_kl.max() - peak) / 2
    if not margin > 0:
        return False
    near = _cluster_means(gains, codes, np.abs(sqrt_kl - peak) <= margin)
    beyond = _cluster_means(gains, codes, sqrt_kl > peak + margin)
    if len(paired := near.keys() & beyond.keys()) >= 3:
        drops = [near[cluster] - beyond[cluster] for cluster in paired]
        test: Any = stats.ttest_1samp(drops, 0, alternative="greater")
    elif min(len(near), len(beyond)) >= 3:  # for example, every point is a cluster
        test = stats.ttest_ind(
            [*near.values()], [*beyond.values()], equal_var=False, alternative="greater"
        )
    else:
        return False
    return bool(test.pvalue < (1 - level) / 2)


def _cluster_means(
    gains: np.ndarray, codes: np.ndarray, row_mask: np.ndarray
) -> dict[Hashable, float]:
    """Return the mean gain of each cluster over its rows in `row_mask`, if it has such rows."""
    names, means = unit_means(gains[row_mask], codes[row_mask].tolist())
    return dict(zip(names, means.tolist(), strict=True))


def _regressors(sqrt_kl: np.ndarray, form: Form) -> np.ndarray:
    """Return the regressors of alpha and beta for distances sqrt_kl, [n] -> [n, 2]."""
    if form == "best-of-n":
        return np.stack([sqrt_kl, -(sqrt_kl**2)], axis=-1)
    return np.stack([sqrt_kl, -sqrt_kl * np.log(np.where(sqrt_kl > 0, sqrt_kl, 1.0))], axis=-1)


def _normal_equations_by_cluster(
    design: np.ndarray, y: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return X^T X [clusters, 2, 2] and X^T y [clusters, 2] of each cluster."""
    count = int(codes.max()) + 1
    squares, products = np.zeros((count, 2, 2)), np.zeros((count, 2))
    np.add.at(squares, codes, design[:, :, None] * design[:, None, :])
    np.add.at(products, codes, design * y[:, None])
    return squares, products


def _solve_normal_equations(squares: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Solve normal equations [..., 2, 2] and [..., 2] for the coefficients (alpha, beta), [..., 2].

    The pseudo-inverse is used, because the equations are singular for a single distance.
    """
    return (np.linalg.pinv(squares, hermitian=True) @ products[..., None])[..., 0]


def _peak_interval(
    coefficients: np.ndarray,
    scaled_covariance: np.ndarray,
    form: Form,
    num_clusters: int,
    near: float,
    far: float,
) -> Interval:
    """Return the peak of the fitted curve, with the interval of distances whose slope may be 0.

    Args:
        coefficients: Alpha and beta, [2].
        scaled_covariance: Covariance of the coefficients times the squared critical value, [2, 2].
        form: Form of the curve.
        num_clusters: Number of clusters.
        near: Smallest measured distance above 0.
        far: Largest measured distance.
    """
    value = _turning_point(float(coefficients[0]), float(coefficients[1]), form, far)
    start = 0.0 if form == "best-of-n" else near
    d = np.unique(
        [
            *np.linspace(start, far, _NUM_TESTED_DISTANCES),
            *([value] if start <= value <= far else []),
        ]
    )
    contrast = _regressor_derivatives(d, form)
    slope = contrast @ coefficients
    variance = np.einsum("ni,ij,nj->n", contrast, scaled_covariance, contrast)
    margin = np.sqrt(np.maximum(variance, 0.0))  # rounding can make it negative
    rising, falling = slope > margin, slope < -margin
    undecided = np.flatnonzero(~rising & ~falling)
    if falling.all():
        return Interval(value, 0.0, float(start), num_clusters)
    if rising.all():
        return Interval(value, far, math.inf, num_clusters)
    # Each bound is between two grid points; use the outer point.
    low = float(d[undecided[0] - 1]) if rising[0] and undecided.size else 0.0
    high = float(d[undecided[-1] + 1]) if falling[-1] and undecided.size else math.inf
    return Interval(value, low, high, num_clusters)


def _regressor_derivatives(sqrt_kl: np.ndarray, form: Form) -> np.ndarray:
    """Return the derivatives of the regressors of alpha and beta at sqrt_kl, [n] -> [n, 2]."""
    if form == "best-of-n":
        return np.stack([np.ones_like(sqrt_kl), -2 * sqrt_kl], axis=-1)
    return np.stack([np.ones_like(sqrt_kl), -np.log(sqrt_kl) - 1], axis=-1)


def _turning_point(alpha: float, beta: float, form: Form, far: float) -> float:
    """Return the distance of the maximum of the curve.

    A curve without a maximum gives 0 if it falls at `far`, and inf if it rises there.
    """
    if beta <= 0:
        return (
            math.inf
            if float(_regressor_derivatives(np.array([far]), form)[0] @ [alpha, beta]) > 0
            else 0.0
        )
    if form == "best-of-n":
        return max(alpha / (2 * beta), 0.0)
    exponent = alpha / beta - 1
    return math.exp(exponent) if exponent < _LARGEST_EXPONENT else math.inf


def _require_fittable(sqrt_kl: np.ndarray, gains: np.ndarray, codes: np.ndarray) -> None:
    """Raise ValueError if the points are not sufficient for a fit with intervals."""
    if sqrt_kl.ndim != 1 or not sqrt_kl.size == gains.size == codes.size:
        raise ValueError(
            f"kl, gain and clusters differ in length: {sqrt_kl.size}, {gains.size}, {codes.size}"
        )
    if not (np.isfinite(sqrt_kl).all() and np.isfinite(gains).all()):
        raise ValueError("kl and gain must be finite")
    if np.unique(sqrt_kl).size < 3 or np.unique(codes).size < 3:
        raise ValueError(
            "a fit with intervals needs at least 3 different distances and 3 clusters, got "
            f"{np.unique(sqrt_kl).size} and {np.unique(codes).size}"
        )


def _upper_bound_text(kl: float) -> str:
    """Return the upper bound of an interval of KL as text."""
    return f"{kl:.3g}" if math.isfinite(kl) else "beyond the data"
