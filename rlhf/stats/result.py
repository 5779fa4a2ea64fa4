"""The result type of all interval functions."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A point estimate with its interval; `low` and `high` are nan if there is none."""

    value: float
    low: float
    high: float
    units: int
    """Number of independent units: prompts, start states, episodes or training seeds."""
    method: str = ""
    """Method that computed the interval; empty if there is none."""
    needs: str = ""
    """Reason why there is no interval, such as "5 units"; empty if there is one."""

    @classmethod
    def without(cls, value: float, units: int, needs: str) -> Interval:
        """Return an estimate without an interval, and the reason."""
        return cls(float(value), math.nan, math.nan, int(units), needs=needs)

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def scaled(self, factor: float, shift: float = 0.0) -> Interval:
        """Return the interval of factor * quantity + shift; `factor` may be negative."""
        low, high = sorted((factor * self.low + shift, factor * self.high + shift))
        if not self.known:
            low = high = math.nan
        return Interval(factor * self.value + shift, low, high, self.units, self.method, self.needs)

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Return plain data: "mean", "low", "high", "n", and "method" (or "needs").

        Numbers that are not finite are None.
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
