"""Simulate the throughput of training with stale rollouts, for 1 to 512 rollout workers.

    python -m benchmarks.async_throughput [--update 90] [--episode 10] [--spread 0.8]

The simulation uses the schedule of the product (`RolloutSchedule`). Its assumptions are in
docs/asynchronous.md. It prints the number of steps per hour for each number of workers and each
maximum staleness, as a Markdown table, and the mean staleness of the batches.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.models.policy_copy import Snapshot
from rlhf.training.rollouts.schedule import RolloutSchedule

WORKERS = tuple(2**n for n in range(10))
STALENESS = (0, 1, 2, 4, 8)


@dataclass(frozen=True)
class Setting:
    """Durations in seconds, and sizes."""

    episodes: int = 512
    """Number of episodes of a batch."""
    episode: float = 10.0
    """Mean duration of an episode."""
    spread: float = 0.8
    """Standard deviation of the logarithm of the duration of an episode."""
    update: float = 90.0
    """Duration of an update of the policy."""
    publish: float = 2.0
    """Duration of loading new weights into the workers."""
    steps: int = 100
    """Number of training steps."""
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """Result of a simulated run."""

    steps_per_hour: float
    staleness: float
    """Mean staleness of the batches, in updates."""
    waiting: float
    """Fraction of the time for which the trainer waits for a batch."""


def collection_times(setting: Setting, workers: int) -> list[float]:
    """Return the duration of the collection of each batch.

    Each worker plays one episode at a time, and begins the next one of the batch at once. A batch
    ends with its last episode.
    """
    rng = np.random.default_rng(setting.seed)
    mu = np.log(setting.episode) - setting.spread**2 / 2
    times = []
    for _ in range(setting.steps):
        busy_until = [0.0] * min(workers, setting.episodes)
        for duration in rng.lognormal(mu, setting.spread, setting.episodes):
            heapq.heapreplace(busy_until, busy_until[0] + float(duration))
        times.append(max(busy_until))
    return times


def simulate(setting: Setting, times: Sequence[float], *, max_staleness: int) -> Outcome:
    """Simulate a run whose batches take the given times to collect."""
    schedule = RolloutSchedule(next_step=0, num_steps=setting.steps, max_staleness=max_staleness)
    now = waited = 0.0
    ends = np.inf  # time at which the current batch is complete
    loaded = -1  # version of the weights of the workers
    staleness = []

    def begin(time: float) -> None:
        """Begin to collect the assigned batch, if there is one."""
        nonlocal ends, loaded
        ends = np.inf
        if (assignment := schedule.assignment) is not None:
            version = assignment.policy.version
            staleness.append(assignment.step - version)
            ends = time + times[assignment.step] + setting.publish * (version != loaded)
            loaded = version

    for step in range(setting.steps):
        idle = schedule.assignment is None
        schedule.use_policy_for_next_batches(Snapshot(step, {}))
        if idle:
            begin(now)
        if not schedule.waiting:
            waited += ends - now
            now = ends
        updated = now + setting.update
        while ends <= now:
            schedule.record_complete_batch()
            begin(ends)
        schedule.record_taken_batch()
        while ends <= updated:
            schedule.record_complete_batch()
            begin(ends)
        now = updated
    return Outcome(3600 * setting.steps / now, float(np.mean(staleness)), waited / now)


def table(setting: Setting) -> str:
    """Return a Markdown table with a row for each number of workers."""
    rows = [
        "| workers | " + " | ".join(f"max_staleness {limit}" for limit in STALENESS) + " |",
        "|---:|" + "---:|" * len(STALENESS),
    ]
    for workers in WORKERS:
        times = collection_times(setting, workers)
        found = [simulate(setting, times, max_staleness=limit) for limit in STALENESS]
        cells = [f"{f.steps_per_hour:.1f} ({f.staleness:.1f})" for f in found]
        rows.append(f"| {workers} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("episode", "spread", "update", "publish"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Setting, name))
    parser.add_argument("--episodes", type=int, default=Setting.episodes)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    print(table(Setting(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
