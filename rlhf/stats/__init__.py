"""Compute point estimates with confidence intervals, and test paired differences.

The package imports only numpy and `scipy.special`, so every other package may import it.
`rlhf.stats.aggregates` computes the aggregates of a benchmark, `rlhf.stats.samples` computes pass@k
and best-of-n, and `rlhf.stats.power` computes sample sizes.

If the sample is too small for an interval with acceptable coverage, the functions return the
estimate without an interval, and `Interval.needs` gives the reason. `docs/statistics.md` lists the
measured coverage, which `tests/stats` verifies.
"""

from rlhf.stats.interval import interval, ratio_interval
from rlhf.stats.jackknife import jackknife, weighted_sum_interval
from rlhf.stats.paired import difference, sign_flip_test
from rlhf.stats.result import Interval
from rlhf.stats.shares import adjusted_wald_bounds, share_interval
from rlhf.stats.units import EQUAL_UNITS_REASON, unit_means

__all__ = [
    "EQUAL_UNITS_REASON",
    "Interval",
    "adjusted_wald_bounds",
    "difference",
    "interval",
    "jackknife",
    "ratio_interval",
    "share_interval",
    "sign_flip_test",
    "unit_means",
    "weighted_sum_interval",
]
