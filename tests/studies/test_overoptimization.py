"""The over-optimization fits against planted truth, brute force and closed forms."""

import itertools
import math

import numpy as np
import pytest

from rlhf.studies.overoptimize.fits import (
    Form,
    OveroptimizationFit,
    best_of_n_kl_bound,
    best_of_n_scores,
    fit_best_of_n,
    fit_curve,
)

# alpha, beta and the peak they imply: 2 / (2 * .4) = 2.5 and exp(1 / .5 - 1) = e
PLANTED: dict[Form, tuple[float, float, float]] = {
    "best-of-n": (2.0, 0.4, 2.5),
    "rl": (1.0, 0.5, math.e),
}


def planted(form: Form, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    alpha, beta, _ = PLANTED[form]
    d = np.linspace(0.2, 5, 25)
    log = d if form == "best-of-n" else np.log(d)
    return d**2, d * (alpha - beta * log) + noise * rng.normal(size=d.size)


@pytest.mark.parametrize("form", ["best-of-n", "rl"])
def test_noiseless_curves_are_recovered_exactly(form: Form):
    rng = np.random.default_rng(0)
    fit = fit_curve(*planted(form, 0.0, rng), form=form)
    truth = PLANTED[form]
    assert (fit.alpha.value, fit.beta.value, fit.peak.value) == pytest.approx(truth, rel=1e-6)
    assert fit.predicted_gold_gain(truth[2]) == pytest.approx(
        fit.predicted_gold_gain(np.linspace(0.1, 9, 2000)).max(), rel=1e-4
    )


@pytest.mark.parametrize("form", ["best-of-n", "rl"])
def test_intervals_hold_the_planted_truth(form: Form):
    rng = np.random.default_rng(1)
    hits = np.zeros(3)
    for _ in range(200):
        fit = fit_curve(*planted(form, 0.3, rng), form=form)
        estimates = (fit.alpha, fit.beta, fit.peak)
        hits += [e.low <= t <= e.high for e, t in zip(estimates, PLANTED[form], strict=True)]
    assert (hits / 200 >= 0.9).all()


def training_runs(
    alpha: float, beta: float, seeds: int, *, between: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL, gold and seed of runs of 40 noisy steps; each run has its own coefficients and reach."""
    d = np.linspace(0.1, 5 * rng.uniform(0.85, 1.15, size=seeds), 40).T
    a = alpha + between * rng.normal(size=(seeds, 1))
    b = beta + 0.5 * between * rng.normal(size=(seeds, 1))
    gold = d * (a - b * np.log(d)) + 0.3 * rng.normal(size=d.shape)
    return d.ravel() ** 2, gold.ravel(), np.repeat(np.arange(seeds), 40)


def fitted_runs(
    alpha: float, beta: float, seeds: int, *, between: float, repetitions: int, seed: int
) -> list[OveroptimizationFit]:
    print("seed", seed)
    rng = np.random.default_rng(seed)
    fits = []
    for _ in range(repetitions):
        kl, gold, codes = training_runs(alpha, beta, seeds, between=between, rng=rng)
        fits.append(fit_curve(kl, gold, form="rl", clusters=codes))
    return fits


def coverage(repetitions: int) -> dict[tuple[float, int, float], float]:
    """Share of peak intervals that hold the true peak, by its place, seeds and spread of seeds."""
    found = {}
    for (alpha, beta), seeds, between in itertools.product(
        [(1.0, 0.5), (0.6, 0.5), (1.0, 0.4)], [3, 5, 10, 20], [0.0, 0.2]
    ):
        fits = fitted_runs(alpha, beta, seeds, between=between, repetitions=repetitions, seed=seeds)
        peak = math.exp(alpha / beta - 1)
        hits = [fit.peak.low <= peak <= fit.peak.high for fit in fits]
        found[peak, seeds, between] = float(np.mean(hits))
    return found


def test_the_interval_of_the_peak_covers_it():
    found = coverage(150)
    assert np.mean(list(found.values())) >= 0.93  # 3,600 fits: two standard errors below 0.94
    assert min(found.values()) >= 0.87


@pytest.mark.sweep
def test_the_interval_of_the_peak_covers_it_at_every_size():
    found = coverage(4000)
    print(found)
    assert np.mean(list(found.values())) >= 0.94
    assert min(found.values()) >= 0.90


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("slope", [0.0, -0.02, -0.2])
def test_flat_or_falling_gold_is_rarely_given_a_peak(seeds: int, slope: float):
    fits = fitted_runs(slope, 0.0, seeds, between=0.0, repetitions=300, seed=seeds)
    assert np.mean([fit.rises_then_falls for fit in fits]) <= 0.05
    rises = [fit for fit in fits if "rises" in fit.advice()]
    assert len(rises) / len(fits) <= 0.05


def test_gold_that_falls_from_the_start_is_said_to_fall():
    fits = fitted_runs(-0.2, 0.0, 10, between=0.0, repetitions=50, seed=0)
    advice = [fit.advice() for fit in fits]
    assert sum("falls from the start" in words for words in advice) >= 45


def test_a_peak_that_the_data_show_is_named():
    """The peak is at half of the measured distances: gold falls there by 0.4, the noise is 0.3."""
    fits = fitted_runs(1.0, 0.5, 10, between=0.0, repetitions=50, seed=1)
    assert np.mean([fit.rises_then_falls for fit in fits]) >= 0.9
    assert all(fit.advice().startswith("stop near KL") == fit.rises_then_falls for fit in fits)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_gold_that_falls_with_the_divergence_has_no_advised_peak(seeds: int):
    """R_RL rises from 0 whatever its coefficients are; the gold here never does."""
    rng = np.random.default_rng(seeds)
    told = 0
    for _ in range(100):
        kl = np.linspace(0, 9, 40) + 0.1 * np.abs(rng.normal(size=(seeds, 40)))
        gold = rng.normal(size=(seeds, 40)) - np.linspace(0, 2, 40)
        codes = np.repeat(np.arange(seeds), 40)
        fit = fit_curve(kl.ravel(), gold.ravel(), form="rl", clusters=codes)
        told += fit.advice().startswith("stop")
    assert told <= 5


@pytest.mark.parametrize("form", ["rl", "best-of-n"])
@pytest.mark.parametrize(
    "curve", [np.tanh, lambda d: 1 - np.exp(-2 * d), lambda d: np.minimum(d, 0.5)]
)
def test_gold_that_rises_and_then_stays_has_no_advised_peak(curve, form: Form):
    rng = np.random.default_rng(0)
    d = np.tile(np.linspace(0.05, 4, 40), 5)
    advice = []
    for _ in range(100):
        gold = curve(d) + 0.1 * rng.normal(size=d.size)
        fit = fit_curve(d**2, gold, form=form, clusters=np.repeat(np.arange(5), 40))
        advice.append(fit.advice())
    assert sum(text.startswith("stop") for text in advice) <= 10
    assert any("gold measured beyond it is not significantly lower" in text for text in advice)


def test_clusters_widen_what_depends():
    rng = np.random.default_rng(2)
    kl, clean = planted("rl", 0.0, rng)
    kls, gains, seeds = [], [], []
    for seed in range(6):
        kls.append(kl)
        gains.append(clean * rng.normal(1, 0.3))  # a whole run is better or worse
        seeds.append(np.full(kl.size, seed))
    data = np.concatenate(kls), np.concatenate(gains)
    alone = fit_curve(*data, form="rl")
    clustered = fit_curve(*data, form="rl", clusters=np.concatenate(seeds))
    assert clustered.alpha.high - clustered.alpha.low > 2 * (alone.alpha.high - alone.alpha.low)


def test_rising_gold_has_no_peak_inside_the_data():
    d = np.linspace(0.1, 3, 20)
    fit = fit_curve(d**2, 1.5 * d + 0.05 * d**2, form="best-of-n")
    assert fit.peak.value == math.inf
    assert "no peak" in fit.advice()
    fit = fit_curve(d**2, d * (2 - 0.1 * d), form="best-of-n")
    assert "extrapolated" in fit.advice()


def test_advice_names_the_peak():
    rng = np.random.default_rng(4)
    words = fit_curve(*planted("best-of-n", 0.05, rng), form="best-of-n").advice()
    assert words.startswith("stop near KL 6.")


def test_kl_of_best_of_n():
    assert best_of_n_kl_bound(1) == 0
    assert best_of_n_kl_bound(4) == pytest.approx(1.386294 - 0.75, abs=1e-6)
    with pytest.raises(ValueError, match="n >= 1"):
        best_of_n_kl_bound(0)


def test_scores_equal_brute_force():
    rng = np.random.default_rng(5)
    proxy, gold = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    scores = best_of_n_scores(proxy, gold, [1, 2, 4, 6])
    for row, (p, g) in enumerate(zip(proxy, gold, strict=True)):
        for column, n in enumerate([1, 2, 4, 6]):
            subsets = [max(s, key=lambda i: p[i]) for s in itertools.combinations(range(6), n)]
            assert scores[row, column] == pytest.approx(np.mean([g[i] for i in subsets]))


def test_estimator_is_exact_for_many_samples():
    # The best of n among ranks 1..N is n (N + 1) / (n + 1) on average.
    ranks = np.arange(1, 2001, dtype=float)[None]
    scores = best_of_n_scores(ranks, ranks, [1, 7, 500, 2000])[0]
    expected = [n * 2001 / (n + 1) for n in (1, 7, 500, 2000)]
    np.testing.assert_allclose(scores, expected, rtol=1e-10)


def test_curve_and_fit_of_a_gamed_proxy():
    """Gold = proxy minus a penalty that grows in the proxy's tail: gold turns, proxy does not."""
    rng = np.random.default_rng(6)
    proxy = rng.normal(size=(150, 256))
    gold = proxy - 0.45 * np.maximum(proxy, 0) ** 2 + 0.3 * rng.normal(size=proxy.shape)
    ns = [1, 2, 4, 8, 16, 32, 64, 128]
    proxies = best_of_n_scores(proxy, proxy, ns).mean(axis=0)
    assert (np.diff(proxies) > 0).all()
    scores = best_of_n_scores(proxy, gold, ns)
    golds = scores.mean(axis=0)
    best = int(np.argmax(golds))
    assert 0 < best < len(ns) - 1
    fit = fit_best_of_n(scores, ns)
    assert fit.peak.low < math.sqrt(best_of_n_kl_bound(ns[best + 1]))
    assert fit.peak.high > math.sqrt(best_of_n_kl_bound(ns[best - 1]))
    assert fit.beta.low > 0


def test_unfittable_data_are_refused():
    with pytest.raises(ValueError, match="3 different distances"):
        fit_curve([1.0, 1.0, 4.0], [1.0, 1.0, 2.0], form="rl")
    with pytest.raises(ValueError, match="finite"):
        fit_curve([1.0, 2.0, math.nan], [1.0, 1.0, 2.0], form="rl")
    with pytest.raises(ValueError, match="differ in length"):
        fit_curve([1.0, 2.0, 3.0], [1.0, 1.0], form="rl")
