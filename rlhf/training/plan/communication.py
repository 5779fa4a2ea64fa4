"""The duration of the communication between the processes of a run.

    python -m rlhf.training.plan.communication RANK PROCESSES FILE    # one process of a measurement

The speeds of two collective operations are measured between processes of this machine, on a CPU.
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

from rlhf.training.plan.duration import StepDuration
from rlhf.training.plan.memory import TrainingState
from rlhf.training.plan.plan import Parallelism

MEASURED_BYTES, REPEATS = 16 * 2**20, 5
"""Size of the measured tensors, about that of the weights of a small transformer block, and number
of measurements."""
MAX_PROCESSES = 8
TIMEOUT_SECONDS = 120.0
"""Maximum number of processes of a measurement, and its time limit in seconds."""


@dataclass(frozen=True)
class CollectiveSpeed:
    """Bytes per second of collective operations, counted by the size of the whole tensor."""

    gather: float
    """Every process receives the parts of all processes (all-gather)."""
    reduce: float
    """Every process receives its part of the sum over all processes (reduce-scatter)."""


def communication_seconds(
    state: TrainingState,
    speed: CollectiveSpeed,
    *,
    shards: int,
    updates: int,
    backward_passes: int,
    forward_passes: int = 0,
) -> float:
    """Return the seconds that a process communicates in a step.

    With shards, every forward pass and every backward pass gathers the weights, and every backward
    pass sums the gradients in float32 (Zhao et al. 2023, arXiv:2304.11277, section 3.2). Without
    shards, the gradients are summed once in every update, and every process receives the sum.

    Args:
        state: The training state.
        speed: The speed of the operations.
        shards: Number of processes over which weights and gradients are sharded.
        updates: Number of optimizer steps.
        backward_passes: Number of forward passes with a backward pass.
        forward_passes: Number of forward passes without a backward pass.
    """
    if shards == 1:
        return updates * state.gradients * (1 / speed.reduce + 1 / speed.gather)
    gathered = (2 * backward_passes + forward_passes) * state.weights
    summed = backward_passes * state.gradients * max(4, state.itemsize) / state.itemsize
    return gathered / speed.gather + summed / speed.reduce


def add_communication(
    duration: StepDuration,
    state: TrainingState,
    parallelism: Parallelism,
    device: torch.device,
    **passes: int,
) -> tuple[StepDuration, list[str]]:
    """Return the duration of a step with the communication between processes of this machine.

    Args:
        duration: The duration without communication.
        state: The training state.
        parallelism: The processes of the run.
        device: Device of the model.
        passes: Arguments of `communication_seconds`.

    Returns:
        The duration, and descriptions of what it does not include.
    """
    if parallelism.processes == 1:
        return duration, []
    if device.type != "cpu" or parallelism.per_machine == 1:
        return duration, ["the communication of processes"]
    speed = measure_collectives(parallelism.per_machine)
    if speed is None:
        return duration, ["the communication of processes, which could not be measured"]
    seconds = communication_seconds(state, speed, shards=parallelism.shards, **passes)
    left_out = []
    if parallelism.processes > parallelism.per_machine:
        left_out.append("the lower speed of the communication between machines")
    return dataclasses.replace(duration, communication=seconds), left_out


def measure_collectives(processes: int) -> CollectiveSpeed | None:
    """Measure the speed of collective operations between processes of this machine.

    Args:
        processes: Number of processes. At most `MAX_PROCESSES` are started.

    Returns:
        The speed, or None if the processes could not communicate.
    """
    count = min(processes, MAX_PROCESSES)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, "-m", __name__]
        started = [
            subprocess.Popen(
                [*arguments, str(rank), str(count), str(Path(folder) / "store")],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            texts = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in started]
            gather, reduce = map(float, texts[0].split())
        except (subprocess.TimeoutExpired, ValueError):
            return None
        finally:
            for process in started:
                process.kill()
                process.wait()
    return CollectiveSpeed(gather, reduce)


def _median_speed(operation: Callable[[], object]) -> float:
    """Return the bytes per second of an operation, after one call that is not counted."""
    operation()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        operation()
        seconds.append(time.perf_counter() - start)
    return MEASURED_BYTES / statistics.median(seconds)


def main(rank: int, processes: int, store: str) -> None:
    """Take part in a measurement; the first process prints both speeds."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=processes
    )
    part = torch.ones(MEASURED_BYTES // 4 // processes)
    whole = torch.ones(part.numel() * processes)
    gather = _median_speed(lambda: distributed.all_gather_into_tensor(whole, part))
    reduce = _median_speed(lambda: distributed.reduce_scatter_tensor(part, whole))
    if rank == 0:
        print(gather, reduce)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
