"""Estimate the temperature, biases and noise of an annotator from preference labels.

The model is P(label) = e + (1 - 2e) * sigmoid(sum_k w_k x_k). Feature x_k is the difference between
the chosen and the rejected reply in reward, length or position, and w_k is its weight. e is the
fraction of randomly flipped labels (Bradley-Terry with a lapse rate). The parameters are fitted by
maximum likelihood with Fisher scoring.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from rlhf.errors import UserError
from rlhf.stats.units import distinct_clusters_and_index

_UPPER_QUANTILE_LEVEL = 0.975
_MAX_NOISE = 0.49


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FittedAnnotator:
    """A fitted annotator. The temperature of feature ``k`` is 1 / weights[k].value."""

    weights: dict[str, Estimate]
    noise: Estimate
    """Fraction of randomly flipped labels, in [0, 0.5)."""

    def temperature(self, feature: str = "reward") -> Estimate:
        """Return 1 / weight of a feature with its interval.

        The temperature is inf if the weight is at most 0. An end of the interval is inf if the
        corresponding end of the weight's interval is at most 0.
        """
        w = self.weights[feature]
        return Estimate(*(1 / x if x > 0 else float("inf") for x in (w.value, w.high, w.low)))


def fit_annotator(
    feature_differences: Mapping[str, Sequence[float] | np.ndarray],
    *,
    fit_noise: bool = True,
    groups: Sequence[Hashable] | None = None,
) -> FittedAnnotator:
    """Fit an annotator model to preference pairs.

    The intervals of the weights are Student's t intervals with the sandwich covariance clustered by
    group. The interval of the noise uses the profile likelihood, because a symmetric interval is
    wrong near the bound at 0. The likelihood-ratio statistic is divided by the design effect of the
    groups.

    Args:
        feature_differences: Name -> differences chosen - rejected of the feature, [N].
        fit_noise: Whether to fit the fraction of randomly flipped labels; otherwise it is 0.
        groups: Group of each pair, such as its prompt, [N]. Pairs of the same group may be
            dependent; by default, all pairs are independent.

    Raises:
        UserError: There are too few pairs, a feature is always 0, or the features are collinear or
            separate the labels perfectly.
    """
    names = list(feature_differences)
    x = np.column_stack([np.asarray(feature_differences[name], dtype=float) for name in names])
    scale = np.sqrt((x**2).mean(0))
    if len(x) <= len(names) + 1 or (scale == 0).any():
        raise UserError(
            "fit_annotator needs at least two pairs more than features, and each feature must be "
            "nonzero for at least one pair"
        )
    x = x / scale
    theta = np.zeros(len(names) + 1)
    theta = _maximize_likelihood(x, theta, free=np.arange(len(names)))
    if fit_noise:
        theta[-1] = 0.05
        theta = _maximize_likelihood(x, theta, free=np.arange(len(names) + 1))
    group_indices = np.arange(len(x)) if groups is None else distinct_clusters_and_index(groups)[1]
    robust, model = _robust_and_model_covariance(
        x, theta, group_indices, num_free=len(names) + int(fit_noise)
    )
    quantile = float(special.stdtrit(max(1, group_indices.max()), _UPPER_QUANTILE_LEVEL))
    weights = {}
    for k, name in enumerate(names):
        margin = quantile * float(np.sqrt(robust[k, k]))
        ends = (theta[k], theta[k] - margin, theta[k] + margin)
        weights[name] = Estimate(*(float(end / scale[k]) for end in ends))
    flips = Estimate(0.0, 0.0, 0.0)
    if fit_noise:
        effect = float(robust[-1, -1] / model[-1, -1])
        flips = _noise_interval(x, theta, max_deviance=max(1.0, effect) * quantile**2)
    return FittedAnnotator(weights, flips)


def _noise_interval(x: np.ndarray, theta: np.ndarray, *, max_deviance: float) -> Estimate:
    """Return the noise with its interval from the profile likelihood.

    The interval contains the noise rates for which the profile log-likelihood is at most
    ``max_deviance`` / 2 below its maximum. ``x`` are the features [N, K], and ``theta`` [K+1] are
    the fitted weights and the noise.
    """
    best, top, free = float(theta[-1]), _log_likelihood(x, theta), np.arange(len(theta) - 1)

    def deviance_excess(noise: float) -> float:
        fixed = theta.copy()
        fixed[-1] = noise
        # Near a noise of 1/2, the likelihood hardly depends on the weights. If the fit fails, the
        # weights of the best fit are used.
        with contextlib.suppress(ValueError):
            fixed = _maximize_likelihood(x, fixed, free=free, iterations=50)
        return 2 * (top - _log_likelihood(x, fixed)) - max_deviance

    def interval_end(noise_bound: float) -> float:
        if abs(noise_bound - best) < 1e-9 or deviance_excess(noise_bound) <= 0:
            return noise_bound
        return optimize.root_scalar(deviance_excess, bracket=(best, noise_bound), xtol=1e-4).root

    return Estimate(best, interval_end(0.0), interval_end(_MAX_NOISE))


def _probability_and_gradient(x: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return P(label) [N], and the gradient with respect to the K weights and the noise [N, K+1].

    ``x`` are the features [N, K], and ``theta`` [K+1] are the weights and the noise.
    """
    s, e = special.expit(x @ theta[:-1]), theta[-1]
    gradient = np.column_stack([(1 - 2 * e) * (s * (1 - s))[:, None] * x, 1 - 2 * s])
    return np.clip(e + (1 - 2 * e) * s, 1e-12, 1 - 1e-12), gradient


def _log_likelihood(x: np.ndarray, theta: np.ndarray) -> float:
    return float(np.log(_probability_and_gradient(x, theta)[0]).sum())


def _maximize_likelihood(
    x: np.ndarray, theta: np.ndarray, *, free: np.ndarray, iterations: int = 200
) -> np.ndarray:
    """Maximize the likelihood over the parameters ``free`` by Fisher scoring with step halving.

    Args:
        x: Features, [N, K].
        theta: Initial weights and noise, [K+1].
        free: Indices in ``theta`` of the parameters to fit; the others are constant.
        iterations: Maximum number of steps.

    Returns:
        The fitted parameters, [K+1]; the noise is in [0, 0.49].

    Raises:
        UserError: The information matrix is singular.
    """
    best = _log_likelihood(x, theta)
    for _ in range(iterations):
        p, gradient = _probability_and_gradient(x, theta)
        g = gradient[:, free]
        information = (g / (p * (1 - p))[:, None]).T @ g
        if np.linalg.cond(information) > 1e12:
            raise UserError("the features are collinear or predict every label; remove one of them")
        step = np.linalg.solve(information, (g / p[:, None]).sum(0))
        for halving in range(30):
            trial = theta.copy()
            trial[free] += step * 0.5**halving
            trial[-1] = np.clip(trial[-1], 0.0, _MAX_NOISE)
            value = _log_likelihood(x, trial)
            if value > best:
                break
        else:
            return theta
        gain, best, theta = value - best, value, trial
        if gain < 1e-9 * len(x):
            return theta
    return theta


def _robust_and_model_covariance(
    x: np.ndarray, theta: np.ndarray, groups: np.ndarray, *, num_free: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster-robust and the model-based covariance, each [num_free, num_free].

    The cluster-robust covariance is the sandwich estimator, and the model-based covariance is the
    inverse Fisher information. ``groups`` [N] are indices that start at 0, and ``num_free`` is the
    number of fitted parameters.
    """
    p, gradient = _probability_and_gradient(x, theta)
    g = gradient[:, :num_free]
    model = np.linalg.inv((g / (p * (1 - p))[:, None]).T @ g)
    count = int(groups.max()) + 1
    scores = np.zeros((count, num_free))
    np.add.at(scores, groups, g / p[:, None])
    correction = count / max(1, count - 1)
    return correction * model @ (scores.T @ scores) @ model, model
