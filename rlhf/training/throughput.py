"""Measure the throughput and the FLOPS utilization of training steps, for ``profile: true``."""

from __future__ import annotations

from typing import Any

from rlhf.algorithms.batch import TrainingBatch
from rlhf.models.flops import forward_and_backward_flops, measure_peak_flops
from rlhf.runs.profiling import efficiency_metrics


class Throughput:
    """Sums the duration and the tokens of the updates between two logged steps.

    Args:
        model: The policy or reward model in training.
        processes: Number of processes that share the passes, each with a device of its own.
    """

    def __init__(self, model: Any, *, processes: int = 1) -> None:
        self.model = model
        self.peak_flops = processes * measure_peak_flops(model.model.dtype, model.device)
        self._reset()

    def _reset(self) -> None:
        self._steps = self._tokens = self._computed_tokens = 0
        self._seconds = self._flops = 0.0

    def add(self, batch: TrainingBatch, *, seconds: float, epochs: int = 1) -> None:
        """Add the duration and the tokens of the updates on a batch.

        Args:
            batch: The batch.
            seconds: Duration of all updates on the batch.
            epochs: Number of epochs of updates on the batch.
        """
        computed = self.model.count_computed_tokens(batch.tokens, batch.attention_mask)
        trained = int(batch.action_mask.sum())
        self._steps += 1
        self._seconds += seconds
        self._tokens += int(batch.attention_mask.sum())
        self._computed_tokens += computed
        self._flops += epochs * forward_and_backward_flops(
            self.model.model,
            tokens=computed,
            head_tokens=trained,
            critic=getattr(self.model, "value_trunk", None),
        )

    def pop_metrics(self) -> dict[str, float]:
        """Return the metrics of the updates since the last call, of which there is at least one.

        The sums are reset.
        """
        metrics = {
            "time/update": round(self._seconds / self._steps, 4),
            "profile/tokens_per_second": self._tokens / self._seconds,
            **efficiency_metrics(
                real_tokens=self._tokens,
                computed_tokens=self._computed_tokens,
                flops_per_second=self._flops / self._seconds,
                peak_flops=self.peak_flops,
            ),
        }
        self._reset()
        return metrics
