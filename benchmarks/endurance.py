"""Measure memory, open handles, threads and step time in a long PPO run of a tiny model.

    python -m benchmarks.endurance FOLDER [--steps 5000]

After every step, a fixed control computation is timed. It does the same kind of work as a step:
training of a tiny transformer. The median times are computed for each block of 100 steps. The
change of the step time over the run is estimated by linear regression of the logarithm of the step
time on the number of the step and on the logarithm of the control time. The control time accounts
for a changing load of the machine, but an idle machine is still necessary. The t interval treats
the blocks as independent units. The first tenth of the run is warm-up. The exit code is 1 if a
limit is exceeded.
"""

from __future__ import annotations

import argparse
import csv
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from rlhf.runs import launch
from rlhf.runs.directory import Run

BLOCK_STEPS = 100
"""Number of steps of a block, which is a row of endurance.csv."""
CONTROL_UPDATES = 8
"""Number of updates in a control computation, which then takes about half as long as a step."""
MAX_TIME_CHANGE = 0.05
"""Maximum of the upper confidence bound of the relative change of the step time over the run."""
MAX_MEMORY_GROWTH = 1.5
"""Maximum of the upper confidence bound of the memory growth, in MiB per 1,000 steps."""


@dataclass(frozen=True)
class BlockMeasurements:
    """Measurements of ``BLOCK_STEPS`` steps."""

    step: int
    """Number of the last step of the block."""
    memory: float
    """Resident memory at the end of the block, in MiB."""
    handles: int
    """Number of open file descriptors at the end of the block."""
    threads: int
    """Number of Python threads at the end of the block."""
    step_ms: float
    """Median time of a step in milliseconds."""
    control_ms: float
    """Median time of the control computation in milliseconds."""


class MeasuredRun(Run):
    """A run that measures the time of every step, and the process after every block of steps."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.blocks: list[BlockMeasurements] = []
        self._times: list[tuple[float, float]] = []
        self._started: float | None = None
        self._control = ControlComputation()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step; after every ``BLOCK_STEPS`` steps, append the measurements to ``blocks``."""
        super().log(step, metrics)
        ended = time.perf_counter()
        self._control.run()
        now = time.perf_counter()
        if self._started is not None:  # The first step includes the start of the run.
            self._times.append((ended - self._started, now - ended))
        if step % BLOCK_STEPS == 0:
            self.blocks.append(self._finish_block(step))
            print(*asdict(self.blocks[-1]).values(), flush=True)
        self._started = time.perf_counter()

    def _finish_block(self, step: int) -> BlockMeasurements:
        """Return the measurements since the last block."""
        times = np.array(self._times)
        self._times.clear()
        step_ms, control_ms = np.median(times, axis=0) * 1e3
        return BlockMeasurements(
            step,
            round(resident_mib(), 2),
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            round(float(step_ms), 3),
            round(float(control_ms), 3),
        )


class ControlComputation:
    """Training of a tiny transformer on constant inputs, without a change of its weights."""

    def __init__(self) -> None:
        import torch

        with torch.random.fork_rng():  # The initial weights do not affect the measured run.
            layer = torch.nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
            self.model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.inputs = torch.ones(8, 32, 16)

    def run(self) -> None:
        """Repeat a forward pass, a backward pass and an optimizer step."""
        for _ in range(CONTROL_UPDATES):
            self.model(self.inputs).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def resident_mib() -> float:
    """Return the resident memory of this process in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def train_and_measure(folder: Path, steps: int) -> list[BlockMeasurements]:
    """Train with PPO on a task of one turn; return the measurements of each block."""
    from rlhf.cli.table import configure
    from rlhf.training.online import train_online

    tree: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"scratch": {"hidden_size": 16, "num_heads": 2, "context": 128}},
        "env": {"id": "text/Echo-v0"},
        "rollout": {"max_new_tokens": 3},
        "num_steps": steps,
        "episodes_per_step": 8,
        "save_every": BLOCK_STEPS,
        "evaluation": {"episodes": 8, "every": BLOCK_STEPS},
    }
    config = configure("ppo", tree)
    run = MeasuredRun.open(asdict(config))
    assert isinstance(run, MeasuredRun)
    try:
        train_online("ppo", config, run)
    finally:
        run.close()
    return run.blocks


def change_over_run_with_interval(
    blocks: list[BlockMeasurements], values: list[float], covariate: list[float] | None = None
) -> tuple[float, float, float]:
    """Return the change of a value over all blocks by linear regression, with its 95% interval.

    Args:
        blocks: The blocks, in order.
        values: Value of each block.
        covariate: A second regressor with one value for each block, if any.

    Returns:
        The change, and the lower and the upper bound of its interval.
    """
    steps = np.array([block.step for block in blocks], dtype=float)
    columns = [np.ones(len(steps)), (steps - steps[0]) / (steps[-1] - steps[0])]
    if covariate is not None:
        columns.append(np.array(covariate) - np.mean(covariate))
    design, observed = np.column_stack(columns), np.array(values)
    inverse = np.linalg.inv(design.T @ design)
    weights = inverse @ design.T @ observed
    residuals = observed - design @ weights
    freedom = len(steps) - design.shape[1]
    error = float(np.sqrt(residuals @ residuals / freedom * inverse[1, 1]))
    change, half = float(weights[1]), float(stats.t.ppf(0.975, freedom)) * error
    return change, change - half, change + half


def summarize_limits(blocks: list[BlockMeasurements]) -> tuple[str, bool]:
    """Return a summary of the measurements as text, and whether all limits are satisfied."""
    measured = blocks[max(1, len(blocks) // 10) :]
    step_times, control_times = (
        [float(np.log(value)) for value in column]
        for column in zip(*((b.step_ms, b.control_ms) for b in measured), strict=True)
    )
    times = np.expm1(change_over_run_with_interval(measured, step_times, control_times))
    memory = change_over_run_with_interval(measured, [block.memory for block in measured])
    thousands = (measured[-1].step - measured[0].step) / 1000
    growth = [value / thousands for value in memory]
    counts = {(block.handles, block.threads) for block in measured}
    kept = times[2] < MAX_TIME_CHANGE and growth[2] < MAX_MEMORY_GROWTH and len(counts) == 1
    return (
        f"step time, adjusted for the control: {times[0]:+.1%} [{times[1]:+.1%}, {times[2]:+.1%}] "
        f"over the run; memory: {growth[0]:+.2f} MiB [{growth[1]:+.2f}, {growth[2]:+.2f}] per "
        f"1,000 steps; (handles, threads): {sorted(counts)}",
        kept,
    )


def main() -> int:
    """Train, write endurance.csv and print the summary; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    arguments = parser.parse_args()
    launch.prepare_process()
    blocks = train_and_measure(arguments.folder, arguments.steps)
    with (arguments.folder / "endurance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(blocks[0])))
        writer.writeheader()
        writer.writerows(asdict(block) for block in blocks)
    text, kept = summarize_limits(blocks)
    print(text)
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
