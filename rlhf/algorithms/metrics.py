"""Metrics of micro-batches; the sum of these metrics gives the metrics of the whole batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf.errors import UserError


@dataclass(frozen=True)
class MetricSums:
    """Detached metrics of a micro-batch; the `+` operator combines two micro-batches.

    The mean over all tokens differs from the mean of the micro-batch means. Each entry of `means`
    therefore stores its numerator and its count, and `compute` divides them.
    """

    means: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Name -> tensor [2] of numerator and count; added over micro-batches."""
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Name -> scalar that is already divided by its global denominator, such as a loss; added over
    micro-batches."""
    maxima: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Name -> scalar; the maximum over micro-batches is kept."""

    def __add__(self, other: "MetricSums") -> "MetricSums":
        return MetricSums(
            means=_merge(self.means, other.means, torch.add),
            sums=_merge(self.sums, other.sums, torch.add),
            maxima=_merge(self.maxima, other.maxima, torch.maximum),
        )

    def on_cpu(self) -> "MetricSums":
        """Return the metrics with tensors on the CPU."""
        parts = (self.means, self.sums, self.maxima)
        return MetricSums(*({name: value.cpu() for name, value in part.items()} for part in parts))

    def compute(self) -> dict[str, float]:
        """Return all metrics by name, as floats; means whose count is 0 are omitted."""
        means = {
            name: float(pair[0] / pair[1]) for name, pair in self.means.items() if pair[1] != 0
        }
        others = {name: float(value) for name, value in (self.sums | self.maxima).items()}
        return means | others


def masked_sum_and_count(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum and the number of the values inside `mask`, [2], detached.

    The result is an entry of `MetricSums.means`.
    """
    total = torch.where(mask, values.detach(), 0.0).sum()
    return torch.stack([total, mask.sum().to(total.dtype)])


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over `mask`.

    The result is 1 for a perfect critic, 0 for a constant critic, and negative for a critic that is
    worse than a constant. It is nan if all returns are equal or `mask` is empty.
    """
    residual, target = (returns - values)[mask], returns[mask]
    variance = target.var(correction=0) if target.numel() else target.new_zeros(())
    return float(1 - residual.var(correction=0) / variance) if variance > 0 else float("nan")


def add_metrics_of_part(
    metrics: Mapping[str, float], added: Mapping[str, float], *, what: str
) -> dict[str, float]:
    """Return the metrics of a step with those that a loss or an engine added.

    Args:
        metrics: The metrics of the training loop.
        added: The metrics of the part, which can be a plug-in.
        what: What the part is, for messages.

    Raises:
        UserError: A metric of the part has the name of a metric of the training loop, or begins
            with ``time/`` or ``profile/``, as the metrics that are added at the end of a step do.
    """
    for name in added:
        if name in {*metrics, "step", "time"} or name.startswith(("time/", "profile/")):
            raise UserError(f"{what}: {name!r} is a metric of the run: choose another name")
    return {**metrics, **added}


def _merge(
    left: dict[str, Tensor], right: dict[str, Tensor], combine: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Return the entries of both mappings; entries with the same name are combined."""
    both = {name: combine(left[name], right[name]) for name in left if name in right}
    return left | right | both
