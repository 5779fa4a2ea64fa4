"""The text of a plan, for ``--dry-run``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rlhf.training.plan.duration import StepDuration
from rlhf.training.plan.memory import Memory, peak_phase
from rlhf.training.plan.plan import Plan

MEMORY_NAMES = {
    "optimizer": "optimizer state",
    "reference": "reference model",
    "critic": "weights of the critic",
    "rewards": "reward models",
    "copies": "copies of the weights for asynchronous rollouts",
    "kv_cache": "KV cache and copied weights of the sampler",
    "temporary": "other tensors",
    "files": "mapped file of the best model",
    "kernels": "compiled kernels",
}
DURATION_NAMES = {
    "passes": "forward and backward passes",
    "scoring": "log-probabilities of policy and reference",
}
"""Names of parts in the text, if they differ from the names of the fields."""

KEYS_BY_PART = {
    "gradients": ("model.lora",),
    "optimizer": ("model.lora", "{optimizer}"),
    "reference": ("model.lora",),
    "critic": ("critic",),
    "activations": ("{batch}", "activation_checkpointing"),
    "logits": ("{batch}",),
    "temporary": ("{batch}",),
    "kv_cache": ("rollout.parallel", "rollout.max_new_tokens"),
    "weights": ("model.dtype",),
    "rewards": ("rewards",),
    "copies": ("rollout.max_staleness",),
}
"""Part of the memory -> keys that lower it."""

OFFLINE_KEYS = {"batch": "micro_batch_size", "optimizer": "trainer.optim"}
ONLINE_KEYS = {"batch": "micro_batch_tokens", "optimizer": "optimizer.name"}


def plan_lines(plan: Plan, *, device_bytes: float, keys: Mapping[str, str]) -> list[str]:
    """Return the lines that state the memory and the duration of a run.

    Args:
        plan: The estimate.
        device_bytes: Bytes of the memory of a device.
        keys: `OFFLINE_KEYS` or `ONLINE_KEYS`.
    """
    name = peak_phase(plan.phases)
    memory = plan.phases[name]
    total = memory.total + plan.overhead
    others = ", ".join(
        f"{other} {bytes_text(size.total + plan.overhead)}"
        for other, size in plan.phases.items()
        if other != name
    )
    lines = [
        _parallelism_text(plan),
        f"memory: about {bytes_text(total)} per device, in the phase {name}: "
        f"{_parts_text(memory)}, "
        f"overhead of the process (Python and the libraries) {bytes_text(plan.overhead)}",
        f"memory of other phases: {others}",
    ]
    largest = total
    if plan.bound:
        largest = plan.overhead + max(size.total for size in plan.bound.values())
        lines.append(
            f"memory, upper bound: {bytes_text(largest)}, if all examples of a micro-batch have "
            "max_length tokens"
        )
    if plan.duration.total:
        seconds = plan.duration.total
        rate = plan.speed.flops_per_second / 1e9
        lines.append(
            f"time: about {seconds_text(seconds)} per step ({_durations_text(plan.duration)}), "
            f"{seconds_text(seconds * plan.num_steps)} for {plan.num_steps:,} steps; from "
            f"the speed of this machine, {rate:,.0f} GFLOP/s in forward and backward passes"
        )
    lines += [f"assumption: {text}" for text in plan.assumptions]
    if largest > device_bytes:
        lines.append(_memory_shortage_warning(memory, largest, device_bytes, keys))
    return lines


def _parallelism_text(plan: Plan) -> str:
    processes, shards = plan.parallelism.processes, plan.parallelism.shards
    text = f"parallelism: {processes} process{'es' if processes > 1 else ''}"
    if processes > 1:
        text += ", which share the micro-batches of a step"
    if shards > 1:
        text += f"; weights, gradients and optimizer state in {shards} shards"
    return text


def _memory_shortage_warning(
    memory: Memory, needed_bytes: float, device_bytes: float, keys: Mapping[str, str]
) -> str:
    """Return the warning that a run needs more memory than there is.

    It lists the keys that lower the parts of ``memory`` with more than 5% of the total.
    """
    parts = sorted(KEYS_BY_PART, key=lambda part: -getattr(memory, part))
    used = [part for part in parts if getattr(memory, part) > 0.05 * memory.total]
    named = dict.fromkeys(key.format(**keys) for part in used for key in KEYS_BY_PART[part])
    return (
        f"warning: {bytes_text(needed_bytes)} are more than the {bytes_text(device_bytes)} of this "
        f"device; these keys lower the memory: {', '.join(named)}"
    )


def _parts_text(memory: Memory) -> str:
    sizes = dataclasses.asdict(memory)
    return ", ".join(
        f"{MEMORY_NAMES.get(part, part)} {bytes_text(size)}" for part, size in sizes.items() if size
    )


def _durations_text(duration: StepDuration) -> str:
    parts = dataclasses.asdict(duration)
    return ", ".join(
        f"{DURATION_NAMES.get(part, part)} {seconds_text(seconds)}"
        for part, seconds in parts.items()
        if seconds
    )


def bytes_text(number: float) -> str:
    """Format a number of bytes in MiB, or in GiB from 1 GiB on."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def seconds_text(seconds: float) -> str:
    """Format a duration in ms, s, min, h or days."""
    for unit, size in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 0.1):
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"
