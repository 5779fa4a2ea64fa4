"""Compute point estimates with confidence intervals, and test paired differences.

The package imports only numpy and `scipy.special`, so every other package may import it.
`rlhf.stats.aggregates` computes the aggregates of a benchmark, `rlhf.stats.samples` computes pass@k
and best-of-n, and `rlhf.stats.power` computes sample sizes.

If the sample is too small for an interval with acceptable coverage, the functions return the
estimate without an interval, and `Interval.needs` gives the reason. `docs/statistics.md` lists the
measured coverage, which `tests/stats` verifies.
"""

from rlhf.stats.interval import interval, ratio_interval
from rlhf.stats.jackknife import jackknife
from rlhf.stats.paired import difference, sign_flip_test
from rlhf.stats.result import Interval
from rlhf.stats.shares import share_interval
from rlhf.stats.units import unit_means

__all__ = [
    "Interval",
    "difference",
    "interval",
    "jackknife",
    "ratio_interval",
    "share_interval",
    "sign_flip_test",
    "unit_means",
]
