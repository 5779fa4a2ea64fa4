"""Estimate the memory and the duration of a run with a trainer of TRL or transformers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rlhf.models.architecture import trunk_of
from rlhf.models.flops import forward_and_backward_flops, forward_flops, measure_peak_flops
from rlhf.training.examples import Example
from rlhf.training.methods import TrainingSetup
from rlhf.training.plan.calibration import PassSpeed
from rlhf.training.plan.duration import StepDuration
from rlhf.training.plan.measured import head_size, overhead_bytes
from rlhf.training.plan.memory import (
    Memory,
    checkpoint_memory,
    training_state,
    update_memory,
)
from rlhf.training.plan.plan import Parallelism, Plan
from rlhf.training.plan.tracing import blocks_or_empty, formula_pass_size

MAX_EXAMPLES = 2048
"""Maximum number of examples whose lengths are read."""


def estimate_trl(
    config: Any,
    setup: TrainingSetup,
    examples: Sequence[Example],
    *,
    num_steps: int,
    parallelism: Parallelism,
) -> Plan:
    """Estimate the memory and the duration of a run with a trainer of TRL or transformers.

    The memory follows from formulas, because the code of these trainers is not traced. TRL computes
    the logits of all tokens, padding included.
    """
    model = setup.model
    name = "sgd" if config.trainer.get("optim") == "sgd" else "adamw"
    reference = (
        model if setup.trainer and "ref_model" in setup.trainer.constructor_arguments else None
    )
    state = training_state(
        model, optimizer=name, blocks=blocks_or_empty(model), reference=reference
    )
    read = [examples[index] for index in range(min(len(examples), MAX_EXAMPLES))]
    lengths = [[len(text) for text in example.ids] for example in read]
    longest = max(max(texts) for texts in lengths)
    texts_per_example = max(map(len, lengths))

    def phases_of(length: int) -> dict[str, Memory]:
        tokens = config.micro_batch_size * texts_per_example * length
        sizes = formula_pass_size(trunk_of(model), tokens)
        head = head_size(model, tokens)
        accumulation = config.batch_size // (config.micro_batch_size * parallelism.processes)
        return {
            "update": update_memory(state, sizes, head, micro_batches=accumulation),
            "checkpoint": checkpoint_memory(state),
        }

    tokens = config.batch_size * statistics.fmean(
        [float(max(texts) * len(texts)) for texts in lengths]
    )
    per_token = forward_and_backward_flops(model, tokens=1, head_tokens=1)
    if reference is not None:
        per_token += forward_flops(reference, tokens=1, head_tokens=1)
    flops = per_token * tokens
    rate = measure_peak_flops(model.dtype, model.device)
    speed = PassSpeed(flops / tokens / rate, 0.0, rate)
    duration = StepDuration(passes=flops / parallelism.processes / rate)
    assumptions = [
        "a trainer of TRL or transformers trains the model: the memory follows from formulas, and "
        "the time is a lower bound, computed from the measured speed of a large matrix product",
    ]
    bound = phases_of(config.max_length)
    overhead = overhead_bytes(state, model.device)
    return Plan(
        phases_of(longest), bound, duration, num_steps, parallelism, speed, overhead, assumptions
    )
