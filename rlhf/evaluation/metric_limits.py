"""Known limits of the metrics of an environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.common.numbers import is_number
from rlhf.stats import Interval


@dataclass(frozen=True)
class ReferenceReturns:
    """Returns of the random and the optimal policy, which have the normalized values 0 and 1."""

    random: float
    optimal: float

    @classmethod
    def if_known(cls, random: Any, optimal: Any) -> ReferenceReturns | None:
        """Return both returns; None if one is not a number, or `random` is not below `optimal`.

        In a constrained task, the return of the optimal policy may be lower than that of the random
        policy, because the random policy may violate the constraint.
        """
        if not is_number(random) or not is_number(optimal) or random >= optimal:
            return None
        return cls(float(random), float(optimal))

    def within(self, low: float, high: float) -> bool:
        """Return whether both returns are in [low, high], up to rounding errors."""
        return self.random >= low - 1e-9 and self.optimal <= high + 1e-9

    def normalize(self, value: float) -> float:
        """Return (value - random) / (optimal - random)."""
        return (value - self.random) / (self.optimal - self.random)

    def normalize_interval(self, estimate: Interval) -> Interval:
        """Return the normalized estimate with its normalized interval."""
        factor = 1 / (self.optimal - self.random)
        return estimate.scaled(factor, -self.random * factor)


@dataclass(frozen=True)
class MetricLimits:
    """Known limits of the metrics of an environment."""

    reference_returns: ReferenceReturns | None = None
    """Returns of the random and the optimal policy; None if they are unknown."""
    turn_limit: int | None = None
    """Maximum number of turns of an episode; None if it is unknown."""
    outcomes: Mapping[str, tuple[float, float]] | None = None
    """Reward component -> its two possible scores, see `Reward.outcomes`; None if it is unknown
    which components have only two."""

    @classmethod
    def common_to(cls, several: Sequence[MetricLimits]) -> MetricLimits:
        """Return the limits that hold in all evaluations of a list.

        A limit that is not equal in all of them is unknown, such as the possible scores of a reward
        whose evaluations used different rewards of one name.
        """
        first, *rest = several
        outcomes = None
        if all(limits.outcomes is not None for limits in several):
            outcomes = {
                name: values
                for name, values in (first.outcomes or {}).items()
                if all((limits.outcomes or {}).get(name) == values for limits in rest)
            }
        return cls(
            first.reference_returns
            if all(limits.reference_returns == first.reference_returns for limits in rest)
            else None,
            first.turn_limit
            if all(limits.turn_limit == first.turn_limit for limits in rest)
            else None,
            outcomes,
        )
