"""How often printed intervals contain the truth: every kind, over the stated range of the truth.

    python -m tests.stats.coverage            # the table of docs/statistics.md, about 15 minutes

A point is one truth at one size. Repetitions for which no interval is printed are left out; a point
at which fewer than a twentieth of them print one is left out too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import expit, ndtr, ndtri

from rlhf.evaluation.harness import metrics_from_harness_output
from rlhf.reward_models.report.calibration import temperature_interval
from rlhf.reward_models.report.intervals import paired_difference_interval
from rlhf.stats import Interval, difference, interval, ratio_interval
from rlhf.stats.aggregates import (
    aggregate_interval,
    improvement_probability_interval,
    iqm,
    mean,
    optimality_gap,
)
from rlhf.stats.samples import pass_at_k
from tests.stats.verdicts import against_reference, success_against_reference

REPETITIONS = 4000
BOOTSTRAP = 300

Rng = np.random.Generator


@dataclass(frozen=True)
class Point:
    """One truth at one size."""

    size: str
    """Units behind an interval, as the table calls them."""
    name: str
    make: Callable[[Rng], Interval]
    """Draws a sample and makes its interval."""
    truth: float


FAMILIES: dict[str, tuple[Callable[[Rng, int], np.ndarray], float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "uniform": (lambda rng, n: rng.random(n), 0.5),
    "Student's t, 3 degrees": (lambda rng, n: rng.standard_t(3, size=n), 0.0),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
    "minus exponential": (lambda rng, n: -rng.exponential(size=n), -1.0),
    "gamma 1/2": (lambda rng, n: rng.gamma(0.5, size=n), 0.5),
    "lognormal 0.75": (lambda rng, n: rng.lognormal(0.0, 0.75, size=n), np.exp(0.75**2 / 2)),
    "beta 1/2, 1/2": (lambda rng, n: rng.beta(0.5, 0.5, size=n), 0.5),
    "half zeros": (lambda rng, n: rng.exponential(size=n) * (rng.random(n) < 0.5), 0.5),
    "70% zeros": (lambda rng, n: rng.exponential(size=n) * (rng.random(n) < 0.3), 0.3),
    "90% zeros": (lambda rng, n: (1 + 0.2 * rng.normal(size=n)) * (rng.random(n) < 0.1), 0.1),
}


def shares() -> Iterator[Point]:
    for n, p in product((2, 3, 5, 10, 20, 100), (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.8, 0.97)):
        yield Point(
            str(n),
            f"p {p}",
            lambda rng, n=n, p=p: interval((rng.random(n) < p).astype(float), kind="share"),
            p,
        )


def _prompt_shares(rng: Rng, prompts: int, p: float, alike: float) -> np.ndarray:
    """Success rates of prompts with mean p; `alike` is the correlation of samples of one prompt."""
    strength = 1 / alike - 1
    return rng.beta(p * strength, (1 - p) * strength, size=prompts)


def clustered_shares() -> Iterator[Point]:
    grid = product((5, 10, 20, 100), (4, 64), (0.03, 0.3, 0.9), (0.05, 0.3, 0.8))
    for prompts, samples, p, alike in grid:

        def make(rng: Rng, g: int = prompts, k: int = samples, p: float = p, a: float = alike):
            right = rng.random((g, k)) < _prompt_shares(rng, g, p, a)[:, None]
            return interval(right.ravel().astype(float), np.repeat(np.arange(g), k), kind="share")

        yield Point(str(prompts), f"{samples} samples, p {p}, correlation {alike}", make, p)


def pass_at_four() -> Iterator[Point]:
    draws = np.random.default_rng(0)
    for prompts, p, alike in product((5, 20, 100), (0.05, 0.3, 0.8), (0.1, 0.5)):
        truth = float((1 - (1 - _prompt_shares(draws, 400_000, p, alike)) ** 4).mean())

        def make(rng: Rng, g: int = prompts, p: float = p, a: float = alike):
            right = rng.binomial(8, _prompt_shares(rng, g, p, a))
            table = [pass_at_k(4, correct=c, drawn=8) for c in range(9)]
            return interval(np.array(table)[right], kind="share")

        yield Point(str(prompts), f"p {p}, correlation {alike}", make, truth)


def means() -> Iterator[Point]:
    for n, (name, (draw, truth)) in product((5, 10, 20, 100), FAMILIES.items()):
        yield Point(str(n), name, lambda rng, n=n, d=draw: interval(d(rng, n), kind="mean"), truth)


def counts() -> Iterator[Point]:
    for n, rate in product((5, 20, 100), (0.1, 0.5, 2.0)):

        def make(rng: Rng, n: int = n, rate: float = rate):
            values = rng.poisson(rate, size=n).astype(float)
            return interval(values, kind="count", bounds=(0.0, np.inf))

        yield Point(str(n), f"Poisson {rate}", make, rate)


def overdispersed_counts() -> Iterator[Point]:
    """Negative binomial counts: Poisson counts whose rate is gamma distributed with this shape."""
    for n, shape, mean_count in product((5, 10, 20, 100), (0.5, 1.0, 4.0), (0.3, 2.0, 50.0)):

        def make(rng: Rng, n: int = n, shape: float = shape, m: float = mean_count):
            values = rng.negative_binomial(shape, shape / (shape + m), size=n).astype(float)
            return interval(values, kind="count", bounds=(0.0, np.inf))

        yield Point(str(n), f"shape {shape}, mean {mean_count}", make, mean_count)


def _turn_laws(limit: int) -> dict[str, np.ndarray]:
    """Probabilities of 1, ..., `limit` turns."""
    turns = np.arange(1, limit + 1)
    laws = {}
    for end in (0.9, 0.5, 0.1):
        law = end * (1 - end) ** (turns - 1)
        law[-1] = (1 - end) ** (limit - 1)
        laws[f"each turn ends it with {end}"] = law
    for long in (0.02, 0.1, 0.5, 0.95):
        law = np.zeros(limit)
        law[0], law[-1] = 1 - long, long
        laws[f"{long} reach the limit, the others end at once"] = law
    either = np.zeros(limit)
    either[:2], either[-1] = 0.4, either[-1] + 0.2
    laws["0.2 reach the limit, the others end in turn 1 or 2"] = either / either.sum()
    return laws


def bounded_counts() -> Iterator[Point]:
    """Turns of episodes, from 1 to the turn limit."""
    for n, limit in product((2, 5, 10, 20, 100), (2, 6, 30)):
        turns = np.arange(1.0, limit + 1)
        for name, law in _turn_laws(limit).items():

            def make(rng: Rng, n: int = n, turns: np.ndarray = turns, law: np.ndarray = law):
                values = rng.choice(turns, p=law, size=n)
                return interval(values, kind="count", bounds=(1.0, float(turns[-1])))

            yield Point(str(n), f"limit {limit}, {name}", make, float(turns @ law))


def unequal_shares() -> Iterator[Point]:
    """Proportions of values, when prompts have different numbers of values."""
    grid = product((5, 10, 20, 100), (0.5, 1.5), (0.03, 0.3, 0.9), (0.05, 0.3, 0.8, 0.999))
    for prompts, skew, p, alike in grid:

        def make(rng: Rng, g: int = prompts, s: float = skew, p: float = p, a: float = alike):
            units, rates = _unequal_prompts(rng, g, s), _prompt_shares(rng, g, p, a)
            right = rng.random(units.size) < rates[units]
            return interval(right.astype(float), units, kind="share", weigh="values")

        yield Point(str(prompts), f"size spread {skew}, p {p}, correlation {alike}", make, p)


def unequal_gains() -> Iterator[Point]:
    """Differences of paired proportions, when prompts have different numbers of values."""
    grid = product((2, 5, 10, 20, 100), (0.5, 1.5), (0.1, 0.5), (0.5, 1.0), (0.05, 0.8))
    for prompts, skew, apart, up, alike in grid:

        def make(rng: Rng, g: int = prompts, s: float = skew, d: float = apart, up: float = up,
                 a: float = alike):  # fmt: skip
            units, rates = _unequal_prompts(rng, g, s), _prompt_shares(rng, g, d, a)
            signs = np.where(rng.random(g) < up, 1.0, -1.0)
            gains = (rng.random(units.size) < rates[units]) * signs[units]
            return _printed(paired_difference_interval(gains, units.tolist()))

        name = f"size spread {skew}, {apart} differ, {up} upwards, correlation {alike}"
        yield Point(str(prompts), name, make, apart * (2 * up - 1))


def _unequal_prompts(rng: Rng, prompts: int, skew: float) -> np.ndarray:
    """Prompt of each value; the logarithms of the numbers of values have this deviation."""
    sizes = np.ceil(4 * rng.lognormal(0.0, skew, size=prompts)).astype(int)
    return np.repeat(np.arange(prompts), sizes)


def _printed(record: dict[str, float]) -> Interval:
    """Interval of a dictionary with the keys of `clustered_mean_interval`."""
    needs = "" if np.isfinite([record["low"], record["high"]]).all() else "none"
    return Interval(
        record["value"], record["low"], record["high"], int(record["groups"]), "", needs
    )


def ratios() -> Iterator[Point]:
    """Nats per token are a power of the length, times noise."""
    grid = product((5, 20, 50, 100), (0.0, 0.3, 0.7, 1.0, 1.5), (-0.5, 0.0, 0.25), (8.0, 50.0))
    for n, skew, power, shape in grid:

        def make(rng: Rng, n: int = n, s: float = skew, p: float = power, shape: float = shape):
            length = rng.lognormal(0.0, s, size=n)
            tokens = np.ceil(30 * length)
            nats = tokens * rng.gamma(shape, 2.0 / shape, size=n) * length**p
            return ratio_interval(nats, tokens)

        draws = np.random.default_rng(1).lognormal(0.0, skew, size=400_000)
        tokens = np.ceil(30 * draws)
        rate = float((tokens * 2.0 * draws**power).sum() / tokens.sum())
        yield Point(str(n), f"length spread {skew}, power {power}, shape {shape}", make, rate)


def temperatures() -> Iterator[Point]:
    """Margins are normal with a standard deviation of 1; the pairs of a prompt are dependent."""
    for prompts, pairs, truth in product((20, 80, 160), (1, 4), (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)):

        def make(rng: Rng, prompts: int = prompts, pairs: int = pairs, truth: float = truth):
            groups = np.repeat(np.arange(prompts), pairs)
            common = rng.normal(size=(2, prompts))[:, groups]
            margins, rank = np.sqrt(0.5) * (common + rng.normal(size=(2, groups.size)))
            signs = np.where(ndtr(rank) < expit(margins / truth), 1.0, -1.0)
            return temperature_interval(margins * signs, groups.tolist())

        yield Point(str(prompts), f"{pairs} pairs, temperature {truth}", make, truth)


def harness_errors() -> Iterator[Point]:
    """Means of documents with the standard error that the harness gives."""
    families = ("uniform", "exponential", "gamma 1/2", "lognormal 0.75", "90% zeros")
    for n, name in product((400, 1000), families):
        draw, truth = FAMILIES[name]

        def make(rng: Rng, n: int = n, draw: Callable = draw):
            values = draw(rng, n)
            error = float(values.std(ddof=1)) / n**0.5
            results = {"task": {"score,none": float(values.mean()), "score_stderr,none": error}}
            output = {"results": results, "n-samples": {"task": {"effective": n}}}
            found = metrics_from_harness_output(output)["task/score"]
            return Interval(found["mean"], found["low"], found["high"], n)

        yield Point(str(n), name, make, truth)


def paired_shares() -> Iterator[Point]:
    for n, apart, tilt in product((2, 5, 10, 20, 100), (0.02, 0.1, 0.3, 0.9), (0.0, 0.5, 1.0)):
        gain, loss = apart * (1 + tilt) / 2, apart * (1 - tilt) / 2

        def make(rng: Rng, n: int = n, gain: float = gain, loss: float = loss):
            draws = rng.random(n)
            return difference(draws < gain, (draws >= gain) & (draws < gain + loss), kind="share")

        yield Point(str(n), f"{apart} differ, tilt {tilt}", make, gain - loss)


def paired_clusters() -> Iterator[Point]:
    for prompts, samples, shift in product((5, 10, 20, 100), (4, 64), (0.0, 0.1, 0.3)):

        def make(rng: Rng, g: int = prompts, k: int = samples, shift: float = shift):
            base = rng.beta(1.0, 1.0, size=g) * 0.7
            better = np.clip(base + shift + rng.uniform(-0.1, 0.1, size=g) * (shift > 0), 0, 1)
            left, right = rng.binomial(k, better) / k, rng.binomial(k, base) / k
            return difference(left, right, kind="share")

        draws = np.random.default_rng(2)
        base = draws.beta(1.0, 1.0, size=400_000) * 0.7
        better = np.clip(base + shift + draws.uniform(-0.1, 0.1, size=400_000) * (shift > 0), 0, 1)
        truth = float((better - base).mean()) if shift else 0.0
        yield Point(str(prompts), f"{samples} samples, shift {shift}", make, truth)


def paired_means() -> Iterator[Point]:
    names = ("normal", "exponential", "gamma 1/2", "half zeros", "90% zeros")
    for n, name in product((5, 10, 20, 100), names):
        draw, truth = FAMILIES[name]
        spread = 0.0 if "zeros" in name else 1.0  # equal parts must cancel exactly

        def make(rng: Rng, n: int = n, draw: Callable = draw, spread: float = spread):
            base = spread * rng.normal(size=n)
            return difference(base + draw(rng, n), base, kind="mean")

        yield Point(str(n), name, make, truth)


def reference_differences() -> Iterator[Point]:
    """Several training seeds against one evaluation of a reference policy."""
    families = ("normal", "exponential", "collapse")
    grid = product((9, 12, 20), families, families[:2], (10, 100), (0.3, 3.0))
    for count, family, reference, units, ratio in grid:
        draw = against_reference(count, family, reference, units=units, ratio=ratio)
        name = f"{family} seeds, {reference} reference, {units} units, ratio {ratio}"
        yield Point(str(count), name, lambda rng, draw=draw: draw(rng).estimate, 0.0)
    rates = ((0.9, 0.1), (0.3, 0.3), (1.0, 0.02))
    for count, pair, collapse, units in product((9, 12, 20), rates, (0.0, 0.3), (10, 100)):
        draw = success_against_reference(count, pair, collapse, units=units)
        name = f"success rates {pair}, {collapse} fail, {units} units"
        truth = (1 - collapse) * pair[0] - pair[1]
        yield Point(str(count), name, lambda rng, draw=draw: draw(rng).estimate, truth)


_BENCH = ("normal", "uniform", "exponential", "minus exponential")
_AGGREGATES = {"IQM": iqm, "mean": mean, "optimality gap": optimality_gap}


def aggregates(name: str) -> Callable[[], Iterator[Point]]:
    def points() -> Iterator[Point]:
        statistic = _AGGREGATES[name]
        for runs, tasks, family in product((5, 10, 20), (1, 4, 12), _BENCH):
            draw, _ = FAMILIES[family]
            shift = np.linspace(0, 1, tasks)

            def table(rng: Rng, rows: int, draw: Callable = draw, shift: np.ndarray = shift):
                return draw(rng, rows * shift.size).reshape(rows, shift.size) + shift

            def make(rng: Rng, runs: int = runs, table: Callable = table):
                return aggregate_interval(
                    table(rng, runs), statistic, rng=rng, repetitions=BOOTSTRAP
                )

            truth = float(statistic(table(np.random.default_rng(3), 400_000 // tasks)))
            yield Point(str(runs), f"{tasks} tasks, {family}", make, truth)

    return points


def improvement() -> Iterator[Point]:
    for runs, tasks, p in product((5, 10, 20), (1, 4), (0.5, 0.76, 0.86, 0.96, 0.99)):
        shift = float(np.sqrt(2) * ndtri(p))

        def make(rng: Rng, runs: int = runs, tasks: int = tasks, shift: float = shift):
            return improvement_probability_interval(
                rng.normal(size=(runs, tasks)) + shift, rng.normal(size=(runs, tasks))
            )

        yield Point(str(runs), f"{tasks} tasks, P {p}", make, p)
    for runs, q in product((5, 10, 20), (0.1, 0.5, 0.9)):
        # A run of the first side fails altogether or wins against all; the other never varies.

        def make(rng: Rng, runs: int = runs, q: float = q):
            return improvement_probability_interval(
                (rng.random((runs, 1)) < q).astype(float), np.full((runs, 1), 0.5)
            )

        yield Point(str(runs), f"all or nothing, P {q}", make, q)


KINDS: dict[str, Callable[[], Iterator[Point]]] = {
    "share": shares,
    "share, several samples a prompt": clustered_shares,
    "share, unequal numbers of values a prompt": unequal_shares,
    "pass@4 of 8": pass_at_four,
    "mean": means,
    "count": counts,
    "overdispersed count": overdispersed_counts,
    "count of turns up to a limit": bounded_counts,
    "ratio (text loss)": ratios,
    "temperature": temperatures,
    "standard error of the harness": harness_errors,
    "paired difference of shares": paired_shares,
    "the same, several samples a prompt": paired_clusters,
    "the same, unequal numbers of values a prompt": unequal_gains,
    "paired difference of means": paired_means,
    "training seeds against one reference evaluation": reference_differences,
    "benchmark: mean": aggregates("mean"),
    "benchmark: optimality gap": aggregates("optimality gap"),
    "benchmark: IQM": aggregates("IQM"),
    "P(improvement)": improvement,
}


def coverage(point: Point, *, seed: int, repetitions: int = REPETITIONS) -> float | None:
    """Share of the printed intervals of a point that contain its truth; None where few are."""
    rng = np.random.default_rng(seed)
    hit = printed = 0
    for _ in range(repetitions):
        found = point.make(rng)
        if not found.needs:
            printed += 1
            hit += found.low - 1e-12 <= point.truth <= found.high + 1e-12
    return hit / printed if printed >= repetitions / 20 else None


def main() -> int:
    print("| interval | units | points | mean coverage | least | where |")
    print("|-|-|-|-|-|-|")
    for kind, points in KINDS.items():
        by_size: dict[str, list[tuple[float, str]]] = {}
        for seed, point in enumerate(points()):
            if (share := coverage(point, seed=seed)) is not None:
                by_size.setdefault(point.size, []).append((share, point.name))
        for size, found in by_size.items():
            least, where = min(found)
            average = np.mean([share for share, _ in found])
            print(
                f"| {kind} | {size} | {len(found)} | {average:.1%} | {least:.1%} | {where} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
