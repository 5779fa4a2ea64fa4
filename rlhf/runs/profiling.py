"""Measure the time and the memory of a training step."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Parts of an online training step; docs/metrics.md describes them.
STEP_PARTS = ("generation", "environments", "rewards", "reference", "scoring", "update")
# Part of a step in place of the first three, if rollouts are collected in the background.
WAITING_FOR_ROLLOUTS = "waiting"


class Stopwatch:
    """Measures the seconds of each part of a training step.

    ``with stopwatch(part):`` adds the duration of the block to the part. If blocks are nested, the
    duration of the inner block is not added to the outer part.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Return a context manager that adds the duration of its ``with`` block to a part."""
        self._add_elapsed_time()
        self._running.append(part)
        try:
            yield
        finally:
            self._add_elapsed_time()
            self._running.pop()

    def _add_elapsed_time(self) -> None:
        now = time.perf_counter()
        if self._running:
            part = self._running[-1]
            self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since
        self._since = now

    def pop_time_metrics(self) -> dict[str, float]:
        """Return the seconds of each part since the last call of this method.

        The keys are ``time/PART``.
        """
        taken, self._seconds = self._seconds, {}
        return {f"time/{part}": round(seconds, 4) for part, seconds in taken.items()}


def efficiency_metrics(
    *, real_tokens: int, computed_tokens: int, flops_per_second: float, peak_flops: float
) -> dict[str, float]:
    """Return the metrics ``profile/...``, which describe the efficiency of an update.

    The metrics are the model FLOPs utilization (MFU), the fraction of padding among the computed
    tokens, the fraction of the real tokens that were not computed because they are in a shared
    prefix, and the peak memory of this process in GiB.

    Args:
        real_tokens: Number of tokens that are not padding.
        computed_tokens: Number of tokens that the model processed.
        flops_per_second: Floating-point operations per second of the update.
        peak_flops: Peak number of floating-point operations per second of the machine.
    """
    return {
        "profile/flop_utilization": flops_per_second / peak_flops,
        "profile/padding": max(0.0, 1 - real_tokens / computed_tokens),
        "profile/shared": max(0.0, 1 - computed_tokens / real_tokens),
        "profile/peak_memory": peak_rss_gib(),
    }


def peak_rss_gib() -> float:
    """Return the peak resident memory of this process, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def resident_bytes() -> int:
    """Return the current resident memory of this process, in bytes; its peak except on Linux."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return int(peak_rss_gib() * 2**30)
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
