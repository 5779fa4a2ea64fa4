"""Measure the memory and the time of updates with and without ``activation_checkpointing``.

    python -m benchmarks.activation_checkpointing

The memory of each side is that of a process of its own. For the time, updates of both sides
alternate in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.paths import ROOT

MIB = 2**20
ROWS, TOKENS, PROMPT = 12, 256, 128
PAIRS = 6


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def reset_peak_memory() -> int:
    """Forget the peak so far, such as that of loading, and return the present memory, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def make_update(*, checkpointing: bool) -> Callable[[int], None]:
    """Return a function that computes the gradients of a number of rows.

    The model has 16 layers of width 384 and random weights.
    """
    from rlhf.runs import launch

    launch.prepare_process()  # the allocator of a run
    import torch

    from rlhf.config.model import ModelSpec, ScratchSpec
    from rlhf.models.loading import load_model
    from rlhf.models.policy import Policy

    shape = ScratchSpec(hidden_size=384, num_layers=16, num_heads=6, context=512, vocab_size=400)
    model, tokenizer = load_model(ModelSpec(scratch=shape, dtype="float32"), seed=0)
    policy = Policy(model, tokenizer)
    if checkpointing:
        policy.checkpoint_activations()
    tokens = torch.randint(0, 256, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    actions = mask.clone()
    actions[:, :PROMPT] = False

    def update(rows: int) -> None:
        scored = policy.score(tokens[:rows], mask[:rows], actions[:rows], with_entropy=False)
        (-scored.logprobs.sum()).backward()

    update(1)  # gradients exist before the measurement
    return update


def print_memory(*, checkpointing: bool) -> None:
    """Print the peak memory of updates, minus that of a process with weights and gradients."""
    from rlhf.runs.launch import collect_garbage_and_trim_heap

    update = make_update(checkpointing=checkpointing)
    collect_garbage_and_trim_heap()
    before = reset_peak_memory()
    for _ in range(2):
        update(ROWS)
    print(json.dumps(peak_memory() - before))


def measure() -> None:
    """Print the ratios of memory and time."""
    sizes = []
    for flag in ("0", "1"):
        command = [sys.executable, "-m", "benchmarks.activation_checkpointing", "--memory", flag]
        text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        sizes.append(json.loads(text.splitlines()[-1]))
    sides = [make_update(checkpointing=flag) for flag in (False, True)]
    ratios = []
    for pair in range(PAIRS + 1):
        seconds = []
        for side in sides if pair % 2 else reversed(sides):
            started = time.perf_counter()
            side(ROWS)
            seconds.append(time.perf_counter() - started)
        plain, recomputed = seconds if pair % 2 else reversed(seconds)
        ratios.append(recomputed / plain)
    ratios = sorted(ratios[1:])  # the first pair is a warm-up
    print(f"memory of activations: {sizes[0] / MIB:.0f} MiB, {sizes[1] / MIB:.0f} MiB with the key")
    print(f"memory: lower by a factor of {sizes[0] / sizes[1]:.2f}")
    print(
        f"time: {statistics.median(ratios):.2f} times as long (median of {PAIRS} pairs; "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", choices=["0", "1"], help="measure the memory of one side")
    options = parser.parse_args()
    if options.memory is None:
        measure()
    else:
        print_memory(checkpointing=options.memory == "1")
