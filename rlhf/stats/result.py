"""Define the result type of the interval functions."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A point estimate with its confidence interval."""

    value: float
    """Point estimate."""
    low: float
    """Lower bound of the interval; nan if there is no interval."""
    high: float
    """Upper bound of the interval; nan if there is no interval."""
    units: int
    """Number of independent units: prompts, start states, episodes or training seeds."""
    method: str = ""
    """Name of the method that computed the interval; empty if there is no interval."""
    needs: str = ""
    """Reason why there is no interval, such as "3 units, an interval needs 5"; empty if there is
    an interval."""

    @classmethod
    def without_bounds(cls, value: float, units: int, needs: str) -> Interval:
        """Return an estimate that has no interval; `needs` is the reason."""
        return cls(float(value), math.nan, math.nan, int(units), needs=needs)

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def scaled(self, factor: float, shift: float = 0.0) -> Interval:
        """Return the estimate of factor * quantity + shift with its interval.

        `factor` may be negative.
        """
        low, high = sorted((factor * self.low + shift, factor * self.high + shift))
        if not self.known:
            low = high = math.nan
        return Interval(factor * self.value + shift, low, high, self.units, self.method, self.needs)

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Return a dictionary for JSON with the keys "mean", "low", "high" and "n".

        Numbers that are not finite are None. The key "method" is added if there is an interval, and
        "needs" if there is none, unless their text is empty.
        """
        record: dict[str, float | int | str | None] = {
            key: value if math.isfinite(value) else None
            for key, value in (("mean", self.value), ("low", self.low), ("high", self.high))
        }
        record["n"] = self.units
        if self.known and self.method:
            record["method"] = self.method
        if not self.known and self.needs:
            record["needs"] = self.needs
        return record
