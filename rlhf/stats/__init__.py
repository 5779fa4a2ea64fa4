"""Point estimates with confidence intervals, and tests of paired differences.

The package imports numpy and `scipy.special` only, so that every other package may import it.

* `interval`: interval of a mean, with clusters as independent units.
* `difference`: the same for paired values; `sign_flip_test` is the exact test of a difference.
* `share_interval`: interval of a share, given its sum and its number of units.
* `jackknife`: interval of a statistic that is not a mean, such as an area or a correlation;
  `weighted_sum` combines independent estimates.
* `rlhf.stats.aggregates`: benchmark aggregates; `rlhf.stats.samples`: pass@k and best-of-n;
  `rlhf.stats.power`: sample sizes.

If no interval has acceptable coverage at a sample size, none is returned and `Interval.needs` gives
the reason. The measured coverage is in `docs/statistics.md` (`tests/stats`).
"""

from rlhf.stats.interval import ALL_EQUAL, interval, ratio_interval
from rlhf.stats.jackknife import jackknife, weighted_sum
from rlhf.stats.paired import difference, sign_flip_test
from rlhf.stats.result import Interval
from rlhf.stats.shares import adjusted_wald, share_interval
from rlhf.stats.units import unit_means

__all__ = [
    "ALL_EQUAL",
    "Interval",
    "adjusted_wald",
    "difference",
    "interval",
    "jackknife",
    "ratio_interval",
    "share_interval",
    "sign_flip_test",
    "unit_means",
    "weighted_sum",
]
