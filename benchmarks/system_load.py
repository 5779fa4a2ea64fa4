"""Measure the processor time of other processes while a step runs."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

STAT_FILE = Path("/proc/stat")


@dataclass(frozen=True)
class LoadReading:
    """Times at one moment, in seconds."""

    clock: float
    """Wall-clock time."""
    own: float
    """Processor time of this process and of its finished child processes."""
    busy: float | None
    """Processor time of all processes; None if the system does not report it."""

    @classmethod
    def now(cls) -> LoadReading:
        """Read the current times."""
        times = os.times()
        return cls(time.perf_counter(), sum(times[:4]), machine_busy_seconds())

    def cores_used_by_others(self, since: LoadReading) -> float | None:
        """Return the number of cores that other processes used since an earlier reading.

        The processor time that the hypervisor assigned to other virtual machines is included. The
        result is None if the system does not report processor times.
        """
        if self.busy is None or since.busy is None:
            return None
        share = (self.busy - since.busy) - (self.own - since.own)
        return max(0.0, share / max(self.clock - since.clock, 1e-9))


def machine_busy_seconds() -> float | None:
    """Return the non-idle processor time since the machine started, in seconds.

    The result is None if the system does not report it.
    """
    if not STAT_FILE.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, STAT_FILE.read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(max_other_cores: float, *, patience: float) -> bool:
    """Wait until other processes use fewer than ``max_other_cores`` cores.

    Args:
        max_other_cores: number of cores.
        patience: maximum number of seconds to wait.

    Returns:
        False if other processes still use more cores after ``patience`` seconds, else True. The
        result is also True if the load is unknown.
    """
    end = time.perf_counter() + patience
    while True:
        before = LoadReading.now()
        time.sleep(0.2)
        others = LoadReading.now().cores_used_by_others(before)
        if others is None or others < max_other_cores:
            return True
        if time.perf_counter() > end:
            return False


def peak_gib() -> float | None:
    """Return the larger of the peak resident memories of this process and its children, in GiB.

    The result is None if the system does not report it.
    """
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit / 2**30
