"""Point estimates with intervals, and tests of paired differences: the numbers behind every table.

A leaf: it imports numpy and `scipy.special` only, so that every other package may import it.

* `interval` makes the interval of one quantity, with clusters as its independent units.
* `difference` does the same for paired values, `sign_flip_test` is the exact test of a difference.
* `share_interval` is the interval of a share known by its sum and its number of units.
* `jackknife` makes the interval of a statistic that is no mean (an area, a correlation), and
  `weighted_sum` that of a sum of independent estimates.

Where no interval is right often enough at the given size there is none, and `Interval.needs` says
how many units one needs. What each interval covers is measured in `tests/stats` and listed in
`docs/statistics.md`.
"""

from rlhf.stats.bootstrap import stretched_interval
from rlhf.stats.interval import (
    ALL_EQUAL,
    FEWEST_UNITS,
    Kind,
    fewest_needed,
    interval,
    moment_interval,
    ratio_interval,
    unit_means,
)
from rlhf.stats.jackknife import jackknife, weighted_sum
from rlhf.stats.means import Moments, mean_bounds, moments_of, stratified_moments
from rlhf.stats.paired import difference, sign_flip_test
from rlhf.stats.result import Interval
from rlhf.stats.shares import adjusted_wald, mid_p_bounds, share_interval

__all__ = [
    "ALL_EQUAL",
    "FEWEST_UNITS",
    "Interval",
    "Kind",
    "Moments",
    "adjusted_wald",
    "difference",
    "fewest_needed",
    "interval",
    "jackknife",
    "mean_bounds",
    "mid_p_bounds",
    "moment_interval",
    "moments_of",
    "ratio_interval",
    "share_interval",
    "sign_flip_test",
    "stratified_moments",
    "stretched_interval",
    "unit_means",
    "weighted_sum",
]
