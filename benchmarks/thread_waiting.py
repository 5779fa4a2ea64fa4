"""Measure small matrix products on threads that wait for each other, beside busy processes.

    python -m benchmarks.thread_waiting [--busy 2] [--seconds 2] [--rounds 3]

A product has the shape of a layer of a small model in a decoding step of 32 rows. GNU OpenMP reads
its settings when torch is imported, so every line is measured in a process of its own. The rounds
alternate between the lines.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from benchmarks.paths import ROOT
from rlhf.runs.launch import SPIN_COUNT

ROWS, WIDTH, WIDE = 32, 576, 1536
DEFAULT_SPIN_COUNT = 300_000
"""Number of iterations of GNU OpenMP without settings (libgomp's manual, GOMP_SPINCOUNT)."""
BUSY_PROGRAM = "while True: pass"


def products_per_second(threads: int, seconds: float) -> float:
    """Return the number of products per second of this process."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDE)
    for _ in range(20):
        torch.mm(left, right)
    started, count = time.perf_counter(), 0
    while (now := time.perf_counter()) - started < seconds:
        torch.mm(left, right)
        count += 1
    return count / (now - started)


def measure(busy: int, seconds: float, rounds: int) -> None:
    """Print the median over the rounds for one thread, and for two with each number."""
    sides = [(1, SPIN_COUNT), (2, SPIN_COUNT), (2, DEFAULT_SPIN_COUNT)]
    rates: dict[tuple[int, int], list[float]] = {side: [] for side in sides}
    others = [subprocess.Popen([sys.executable, "-c", BUSY_PROGRAM]) for _ in range(busy)]
    try:
        for number in range(rounds):
            for threads, spin in sides if number % 2 else reversed(sides):
                command = [sys.executable, "-m", "benchmarks.thread_waiting"]
                options = ["--threads", str(threads), "--seconds", str(seconds)]
                done = subprocess.run(
                    command + options,
                    cwd=ROOT,
                    env=os.environ | {"GOMP_SPINCOUNT": str(spin)},
                    check=True,
                    stdout=subprocess.PIPE,
                )
                rates[threads, spin].append(json.loads(done.stdout))
    finally:
        for other in others:
            other.kill()
            other.wait()
    for (threads, spin), values in rates.items():
        rate = statistics.median(values)
        print(
            f"{threads} thread(s), {spin:,} iterations: {rate:,.0f} products/s, "
            f"{2e-9 * ROWS * WIDTH * WIDE * rate:.1f} GFLOP/s"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--busy", type=int, default=2, help="number of busy processes")
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads is not None:
        print(json.dumps(products_per_second(given.threads, given.seconds)))
    else:
        measure(given.busy, given.seconds, given.rounds)
