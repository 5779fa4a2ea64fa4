"""Measure the time and the memory of a training step."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

# Parts of an online step, in their order; docs/metrics.md describes them.
STEP_PARTS = ("generation", "environments", "rewards", "reference", "scoring", "update")


class Stopwatch:
    """Measures seconds by part; the time of a nested part is excluded from the outer part."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time inside the ``with`` block to a part."""
        self._lap()
        self._running.append(part)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._running:
            part = self._running[-1]
            self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """Return the seconds by part since the last call, as metrics."""
        taken, self._seconds = self._seconds, {}
        return {f"time/{part}": round(seconds, 4) for part, seconds in taken.items()}


def update_efficiency(
    *, real: int, computed: int, flops: float, peak_flops: float
) -> dict[str, float]:
    """Return FLOPS utilization, the shares of padding and reused tokens, and peak memory.

    The share of padding is relative to the computed tokens. The share of reused tokens, which
    belong to shared prefixes, is relative to the real tokens.

    Args:
        real: Number of tokens that are not padding.
        computed: Number of tokens that the model processed.
        flops: Floating-point operations per second of the training step.
        peak_flops: Peak number of floating-point operations per second of the machine.
    """
    return {
        "profile/flop_utilisation": flops / peak_flops,
        "profile/padding": max(0.0, 1 - real / computed),
        "profile/shared": max(0.0, 1 - computed / real),
        "profile/peak_memory": peak_rss_gib(),
    }


def peak_rss_gib() -> float:
    """Return the largest resident size of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
