"""The type that every interval of the project has."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; `low` and `high` are nan where there is none."""

    estimate: float
    low: float
    high: float
    units: int
    """Independent units behind the estimate: prompts, start states, episodes or training seeds."""
    method: str = ""
    """How the interval was made; empty where there is none."""
    needs: str = ""
    """Where there is no interval: what one would need, in a few words."""

    @classmethod
    def without(cls, estimate: float, units: int, needs: str) -> Interval:
        """An estimate that has no interval, and what one needs."""
        return cls(float(estimate), math.nan, math.nan, int(units), needs=needs)

    @property
    def value(self) -> float:
        """The estimate, by the name that tables use."""
        return self.estimate

    @property
    def n(self) -> int:
        """The units, by the name that tables use."""
        return self.units

    @property
    def known(self) -> bool:
        """Whether there is an interval at all."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def scaled(self, factor: float, shift: float = 0.0) -> Interval:
        """The interval of `factor` times the quantity plus `shift`; `factor` may be negative."""
        low, high = sorted((factor * self.low + shift, factor * self.high + shift))
        if not self.known:
            low = high = math.nan
        return Interval(
            factor * self.estimate + shift, low, high, self.units, self.method, self.needs
        )

    def as_dict(self) -> dict[str, float | int | str | None]:
        """For JSON: "mean", "low", "high", "n", and "method" or, without an interval, "needs"."""
        found: dict[str, float | int | str | None] = {
            "mean": self.estimate if math.isfinite(self.estimate) else None,
            "low": self.low if self.known else None,
            "high": self.high if self.known else None,
            "n": self.units,
        }
        if self.known and self.method:
            found["method"] = self.method
        if not self.known and self.needs:
            found["needs"] = self.needs
        return found
