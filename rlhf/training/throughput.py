"""What `profile: true` tells of the steps of an offline stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rlhf.algorithms.batch import TrainingBatch
from rlhf.models.flops import peak_flops, update_flops
from rlhf.runs.profiling import usage


class Throughput:
    """Adds up steps between two lines of the log.

    Args:
        learner: what is trained.
    """

    def __init__(self, learner: Any) -> None:
        self.learner = learner
        self.peak_flops = peak_flops(learner.model.dtype, learner.device)
        self._clear()

    def _clear(self) -> None:
        self.steps = self.real = self.computed = 0
        self.seconds = self.flops = 0.0

    @contextlib.contextmanager
    def step(self, batch: TrainingBatch) -> Iterator[None]:
        """Count what happens inside the ``with`` block as one step on a batch."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        computed = self.learner.computed_tokens(batch.tokens, batch.attention_mask)
        learned = int(batch.action_mask.sum())
        self.steps += 1
        self.real += int(batch.attention_mask.sum())
        self.computed += computed
        self.flops += update_flops(self.learner.model, tokens=computed, learned=learned)

    def take(self) -> dict[str, float]:
        """Metrics of the steps since the last call."""
        told = {
            "time/update": round(self.seconds / self.steps, 4),
            "profile/tokens_per_second": self.real / self.seconds,
            **usage(
                real=self.real,
                computed=self.computed,
                flops=self.flops / self.seconds,
                peak_flops=self.peak_flops,
            ),
        }
        self._clear()
        return told
