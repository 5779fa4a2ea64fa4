"""What the rest of the machine does while a step runs."""

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
    busy: float | None  # of all processors; None where the system does not tell

    @classmethod
    def now(cls) -> Reading:
        """The counters as they are."""
        times = os.times()
        return cls(time.perf_counter(), sum(times[:4]), busy_seconds())

    def others(self, since: Reading) -> float | None:
        """Cores that other processes kept busy between two readings; None where unknown.

        Time that the hypervisor gave to other machines counts as theirs.
        """
        if self.busy is None or since.busy is None:
            return None
        share = (self.busy - since.busy) - (self.own - since.own)
        return max(0.0, share / max(self.clock - since.clock, 1e-9))


def busy_seconds() -> float | None:
    """Processor seconds since the machine started that were not idle."""
    if not STAT.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, STAT.read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(limit: float, *, patience: float) -> bool:
    """Wait until other processes use less than ``limit`` of a core; False when that never came.

    Args:
        limit: cores.
        patience: seconds to wait at most.
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
    """Largest resident memory of this process, or of a program that it started, in GiB.

    None where the system does not tell.
    """
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit / 2**30
