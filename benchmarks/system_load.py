"""Measure the load of other processes while a step runs."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Reading:
    """Counters at one moment, in seconds."""

    clock: float
    own: float  # processor time of this process and of its finished children
    busy: float | None  # of all processors; None if the system does not report it

    @classmethod
    def now(cls) -> Reading:
        """Read the current counters."""
        times = os.times()
        return cls(time.perf_counter(), sum(times[:4]), busy_seconds())

    def others(self, since: Reading) -> float | None:
        """Return the number of cores that other processes used between readings; None if unknown.

        Time that the hypervisor gave to other virtual machines is included.
        """
        if self.busy is None or since.busy is None:
            return None
        share = (self.busy - since.busy) - (self.own - since.own)
        return max(0.0, share / max(self.clock - since.clock, 1e-9))


def busy_seconds() -> float | None:
    """Return the processor seconds since the machine started that were not idle."""
    if not STAT.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, STAT.read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(limit: float, *, patience: float) -> bool:
    """Wait until other processes use fewer than ``limit`` cores; return False after ``patience``.

    Args:
        limit: number of cores.
        patience: maximum number of seconds to wait.
    """
    end = time.perf_counter() + patience
    while True:
        before = Reading.now()
        time.sleep(0.2)
        others = Reading.now().others(before)
        if others is None or others < limit:
            return True
        if time.perf_counter() > end:
            return False


def peak_gib() -> float | None:
    """Return the largest resident memory of this process or of its child processes, in GiB.

    The result is None if the system does not report it.
    """
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit / 2**30
