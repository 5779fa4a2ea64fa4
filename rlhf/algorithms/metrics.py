"""Metrics of micro-batches, whose sum gives the metrics of the whole batch."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class MetricSums:
    """Detached sums and maxima of a micro-batch, which can be added over micro-batches.

    A mean over tokens differs from the mean of micro-batch means, so each entry of `means` keeps
    its numerator and its count until `compute`.
    """

    means: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Name -> [numerator, count], shape [2]."""
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Name -> scalar that is already divided by its global denominator, such as a loss."""
    maxima: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Name -> scalar maximum."""

    def __add__(self, other: "MetricSums") -> "MetricSums":
        return MetricSums(
            means=_merge(self.means, other.means, torch.add),
            sums=_merge(self.sums, other.sums, torch.add),
            maxima=_merge(self.maxima, other.maxima, torch.maximum),
        )

    def compute(self) -> dict[str, float]:
        """Return the metrics as floats; means over zero tokens are omitted."""
        means = {
            name: float(pair[0] / pair[1]) for name, pair in self.means.items() if pair[1] != 0
        }
        others = {name: float(value) for name, value in (self.sums | self.maxima).items()}
        return means | others


def masked_sum_and_count(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum and the number of the values inside `mask`, [2], for `MetricSums.means`."""
    total = torch.where(mask, values.detach(), 0.0).sum()
    return torch.stack([total, mask.sum().to(total.dtype)])


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over `mask`.

    It is 1 for a perfect critic, 0 for a constant one, negative for one that is worse than a
    constant, and nan if all returns are equal.
    """
    residual, target = (returns - values)[mask], returns[mask]
    variance = target.var(correction=0) if target.numel() else target.new_zeros(())
    return float(1 - residual.var(correction=0) / variance) if variance > 0 else float("nan")


def _merge(
    left: dict[str, Tensor], right: dict[str, Tensor], combine: Callable[..., Tensor]
) -> dict[str, Tensor]:
    both = {name: combine(left[name], right[name]) for name in left if name in right}
    return left | right | both
