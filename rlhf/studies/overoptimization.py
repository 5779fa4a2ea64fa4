"""How far a proxy reward can be trusted: the curves of Gao, Schulman & Hilton (2022).

With d = sqrt(KL from the starting policy), the gold score gained since the start follows
R_bon(d) = d (alpha - beta d) under best-of-n and R_RL(d) = d (alpha - beta log d) under RL
(section 3.1). Both are 0 at d = 0 and linear in alpha and beta, so least squares is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rlhf.evaluation.statistics import Estimate, best_of_n, mean_interval, stretched_interval

Form = Literal["best-of-n", "rl"]


@dataclass(frozen=True)
class Fit:
    """Fitted coefficients and the peak they predict, each with its interval."""

    form: Form
    alpha: Estimate
    beta: Estimate
    peak: Estimate
    """d = sqrt(KL) at which gold is highest; inf where the fit never turns down."""
    furthest: float
    """Largest d that was measured; a peak beyond it is an extrapolation."""

    def gold(self, d: ArrayLike) -> np.ndarray:
        """Predicted gain in gold at d = sqrt(KL), elementwise."""
        return _design(np.asarray(d, dtype=float), self.form) @ [self.alpha.value, self.beta.value]

    def advice(self) -> str:
        """When to stop, in one sentence, with the interval of the peak as KL in nats."""
        kl = self.peak.value**2
        if not math.isfinite(kl):
            further = "train on" if self.form == "rl" else "try a larger n"
            return f"no peak: gold does not turn down within this fit; {further}, keep measuring"
        ends = f"[{_ends(self.peak.low**2)}, {_ends(self.peak.high**2)}]"
        if self.peak.value > self.furthest:
            return (
                f"gold still rises at KL {self.furthest**2:.3g}; a peak near KL {kl:.3g} {ends} is "
                "extrapolated"
            )
        return f"stop near KL {kl:.3g} {ends}, where gold peaks"


@dataclass(frozen=True)
class BestOfN:
    """Best-of-n by proxy for several n, from one set of samples."""

    ns: Sequence[int]
    kl: Sequence[float]
    proxy: Sequence[Estimate]
    gold: Sequence[Estimate]
    """Mean over prompts with a t interval; absolute scores, as given."""


def kl_best_of_n(n: int) -> float:
    """Upper bound on KL(best of n || policy) in nats: log n - (n - 1) / n, tight without ties."""
    if n < 1:
        raise ValueError(f"best-of-n needs n >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n_scores(proxy: ArrayLike, gold: ArrayLike, ns: Sequence[int]) -> np.ndarray:
    """Expected gold of the proxy's choice among n, unbiased. [prompts, N] -> [prompts, ns]

    Several proxies [proxies, prompts, N] give the mean over them.
    """
    by, score = np.asarray(proxy, dtype=float), np.asarray(gold, dtype=float)
    if by.ndim == 3:
        columns = np.broadcast_to(score, by.shape)
        pairs = zip(by, columns, strict=True)
        return np.mean([best_of_n_scores(p, g, ns) for p, g in pairs], axis=0)
    if by.ndim != 2 or by.shape != score.shape:
        raise ValueError(f"need two arrays [prompts, samples], got {by.shape} and {score.shape}")
    return np.array([[best_of_n(p, g, n) for n in ns] for p, g in zip(by, score, strict=True)])


def best_of_n_curve(proxy: ArrayLike, gold: ArrayLike, ns: Sequence[int]) -> BestOfN:
    """Proxy and gold of the proxy's choice against KL; inputs [prompts, samples of one policy].

    Several proxies [proxies, prompts, samples] give the mean curve of each on its own.
    """
    by_proxy = best_of_n_scores(proxy, proxy, ns)
    by_gold = best_of_n_scores(proxy, gold, ns)
    return BestOfN(
        ns=tuple(ns),
        kl=tuple(kl_best_of_n(n) for n in ns),
        proxy=tuple(mean_interval(column) for column in by_proxy.T),
        gold=tuple(mean_interval(column) for column in by_gold.T),
    )


def fit_best_of_n(
    proxy: ArrayLike,
    gold: ArrayLike,
    ns: Sequence[int],
    *,
    rng: np.random.Generator,
    repetitions: int = 1000,
) -> Fit:
    """Fit R_bon to the gain over n = 1; prompts are redrawn, as all n share their samples."""
    scores = best_of_n_scores(proxy, gold, [1, *ns])
    gains = scores[:, 1:] - scores[:, :1]
    d = np.sqrt([kl_best_of_n(n) for n in ns])
    prompts = np.repeat(np.arange(gains.shape[0]), d.size)
    x = np.tile(d, gains.shape[0])
    return fit_curve(
        x**2,
        gains.ravel(),
        form="best-of-n",
        rng=rng,
        clusters=prompts,
        repetitions=repetitions,
    )


def fit_curve(
    kl: ArrayLike,
    gain: ArrayLike,
    *,
    form: Form,
    rng: np.random.Generator,
    clusters: Sequence[object] | np.ndarray | None = None,
    repetitions: int = 1000,
) -> Fit:
    """Least squares of gold gained since the start, with cluster-bootstrap intervals.

    Args:
        kl: nats from the starting policy [n]; small negative estimates count as 0.
        gain: gold score minus gold at the start [n].
        form: "best-of-n" or "rl".
        rng: draws the bootstrap.
        clusters: what depends on each other [n], e.g. the training seed of each point; by default
            every point stands alone.
        repetitions: of the bootstrap.

    Raises:
        ValueError: lengths differ, values are not finite, or fewer than 3 clusters or distances.
    """
    d, y = np.sqrt(np.maximum(np.asarray(kl, dtype=float), 0)), np.asarray(gain, dtype=float)
    labels = np.arange(d.size) if clusters is None else np.asarray(clusters)
    _, codes = np.unique(labels, return_inverse=True)
    _require_fittable(d, y, codes)
    squares, products = _normal_equations(_design(d, form), y, codes)
    alpha, beta = _solve(squares.sum(axis=0), products.sum(axis=0))
    count = len(squares)
    drawn = rng.integers(0, count, size=(repetitions, count))
    replicates = _solve(squares[drawn].sum(axis=1), products[drawn].sum(axis=1))
    # Two coefficients cost two degrees of freedom.
    low_high = [
        stretched_interval(float(point), values, count - 1, count - 2, 0.95)
        for point, values in zip((alpha, beta), replicates.T, strict=True)
    ]
    return Fit(form, *low_high, peak=_peak(alpha, beta, replicates, form), furthest=float(d.max()))


def _design(d: np.ndarray, form: Form) -> np.ndarray:
    """Columns that alpha and beta multiply. [n] -> [n, 2]"""
    if form == "best-of-n":
        return np.stack([d, -(d**2)], axis=-1)
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], axis=-1)


def _normal_equations(
    design: np.ndarray, y: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """X^T X [clusters, 2, 2] and X^T y [clusters, 2] of each cluster."""
    count = int(codes.max()) + 1
    squares, products = np.zeros((count, 2, 2)), np.zeros((count, 2))
    np.add.at(squares, codes, design[:, :, None] * design[:, None, :])
    np.add.at(products, codes, design * y[:, None])
    return squares, products


def _solve(squares: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Least squares from normal equations; the pseudo-inverse serves draws of a single distance."""
    return (np.linalg.pinv(squares, hermitian=True) @ products[..., None])[..., 0]


def _peak(alpha: float, beta: float, replicates: np.ndarray, form: Form) -> Estimate:
    point = float(_peaks(np.array([[alpha, beta]]), form)[0])
    found = _peaks(replicates, form)
    # Percentiles that need no arithmetic between a number and infinity.
    low, high = np.quantile(found, [0.025, 0.975], method="nearest")
    return Estimate(point, float(low), float(high), len(replicates))


def _peaks(coefficients: np.ndarray, form: Form) -> np.ndarray:
    """alpha / (2 beta), or exp(alpha / beta - 1); inf where gold never falls. [n, 2] -> [n]"""
    alpha, beta = coefficients.T
    safe = np.where(beta > 0, beta, 1.0)
    if form == "best-of-n":
        peaks = np.maximum(alpha / (2 * safe), 0)
    else:
        peaks = np.exp(np.minimum(alpha / safe - 1, 700))
    return np.where(beta > 0, peaks, np.inf)


def _require_fittable(d: np.ndarray, y: np.ndarray, codes: np.ndarray) -> None:
    if d.ndim != 1 or not d.size == y.size == codes.size:
        raise ValueError(f"kl, gain, clusters differ in length: {d.size}, {y.size}, {codes.size}")
    if not (np.isfinite(d).all() and np.isfinite(y).all()):
        raise ValueError("kl and gain must be finite")
    if np.unique(d).size < 3 or np.unique(codes).size < 3:
        raise ValueError(
            "a fit with intervals needs at least 3 different distances and 3 clusters, got "
            f"{np.unique(d).size} and {np.unique(codes).size}"
        )


def _ends(kl: float) -> str:
    return f"{kl:.3g}" if math.isfinite(kl) else "beyond the data"
