"""Measure how quickly this machine runs the parts of a training step, in a few seconds.

The measured passes are those of training, over rows with the lengths of the run, but with the first
blocks of the model only. Two numbers of blocks give the time of one block and the time of the rest,
which is mostly that of the output head. The times depend on the shapes of the model, on the device
and on other programs that run at the same time.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf.algorithms.batch import TrainingBatch
from rlhf.models.architecture import trunk_of
from rlhf.models.flops import forward_and_backward_flops, forward_flops
from rlhf.rollout.sampling.base import Request, SamplingParams
from rlhf.rollout.sampling.continuous import ContinuousEngine
from rlhf.rollout.sampling.decoder_selection import UNSUPPORTED_ERRORS
from rlhf.training.optimizers import OptimizerSettings, make_optimizer
from rlhf.training.plan.memory import parameter_bytes
from rlhf.training.plan.tracing import blocks_or_empty, copy_with_first_blocks

ForwardPass = Callable[[Any, TrainingBatch], torch.Tensor]
"""Function of a model with fewer blocks and a micro-batch. It runs the forward pass of training and
returns a scalar to differentiate."""

MAX_BLOCKS = 8
"""Maximum number of blocks of the larger model of a calibration. With more blocks, the difference
of the times of the two models is more precise."""
MAX_FLOPS = 3e11
"""Maximum number of operations of a measured forward and backward pass; a core computes them in a
few seconds."""
MIN_TOKENS = 64
"""Number of tokens that a measured pass may have even if they exceed `MAX_FLOPS`."""
MIN_REPEATS, MEASURE_SECONDS = 3, 1.5
"""Minimum number of repetitions of a measurement, and the time until which it is repeated further,
up to 20 times."""
DECODING_BYTES = 512 * 2**20
"""Bytes of the blocks in the measured decoding steps, if the model has as many. Fewer weights could
stay in the caches of the processor, and every step of a large model reads its weights from
memory."""
DECODING_STEPS = 6
OPTIMIZER_ELEMENTS = 32 * 2**20
"""Number of weights in the measured optimizer steps, if the model has as many. The reason is that
of `DECODING_BYTES`."""


@dataclass(frozen=True)
class PassSpeed:
    """Speed of a pass over a micro-batch, for the blocks and for the rest of the model."""

    per_token: float
    """Seconds of all blocks for one token."""
    per_head_token: float
    """Seconds of the rest of the model for one token with a loss."""
    flops_per_second: float
    """Floating-point operations of the measured pass per second."""

    def seconds(self, tokens: float, head_tokens: float) -> float:
        """Return the duration of a pass."""
        return self.per_token * tokens + self.per_head_token * head_tokens


def measure_passes(
    model: Any,
    micro_batch: TrainingBatch,
    run: ForwardPass,
    *,
    count_tokens: Callable[[TrainingBatch], int],
) -> tuple[PassSpeed, PassSpeed]:
    """Measure passes over rows of a micro-batch.

    Args:
        model: Model of the run.
        micro_batch: Micro-batch of the run, from which the first rows are taken.
        run: Forward pass of training.
        count_tokens: Returns the number of tokens that the decoder computes for a micro-batch.

    Returns:
        The speed of a forward and a backward pass, and the speed of a forward pass alone.
    """
    total = count_blocks(model)
    counts = sorted({1, min(total, MAX_BLOCKS)})
    try:
        return _measure_short_models(model, counts, micro_batch, run, count_tokens)
    except UNSUPPORTED_ERRORS:  # the code of the model needs all blocks
        return _measure_short_models(model, [total], micro_batch, run, count_tokens)


def count_blocks(model: Any) -> int:
    """Return the number of blocks of a model; a model without a list of blocks counts as one."""
    return len(blocks_or_empty(model)) or 1


def _with_first_blocks(model: Any, count: int) -> Any:
    """Return a model with the first blocks only; the model itself if this includes all blocks."""
    if count == count_blocks(model):
        return model
    return copy_with_first_blocks(model, trunk_of(model), count)


def _measure_short_models(
    model: Any,
    counts: Sequence[int],
    micro_batch: TrainingBatch,
    run: ForwardPass,
    count_tokens: Callable[[TrainingBatch], int],
) -> tuple[PassSpeed, PassSpeed]:
    """Measure the passes of models with some numbers of blocks; see `measure_passes`."""
    short, larger = [_with_first_blocks(model, count) for count in counts], counts[-1]
    batch = _rows_within_flops_limit(short[-1], micro_batch, count_tokens)
    tokens, head_tokens = count_tokens(batch), int(batch.action_mask.sum())
    sizes = {"tokens": tokens, "head_tokens": head_tokens}
    flops = forward_and_backward_flops(short[-1], **sizes), forward_flops(short[-1], **sizes)

    def update(model: Any) -> None:
        run(model, batch).backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(model: Any) -> None:
        run(model, batch)

    speeds = []
    for function, operations in zip((update, forward), flops, strict=True):
        seconds = _median_seconds(*(functools.partial(function, each) for each in short))
        block = seconds[-1] / larger  # with one model, its head counts as a part of the blocks
        if len(counts) > 1:
            block = min(block, max(0.0, (seconds[-1] - seconds[0]) / (larger - counts[0])))
        rest = max(0.0, seconds[-1] - larger * block)
        speeds.append(
            PassSpeed(
                per_token=count_blocks(model) * block / tokens,
                per_head_token=rest / max(head_tokens, 1),
                flops_per_second=operations / seconds[-1],
            )
        )
    return speeds[0], speeds[1]


def _rows_within_flops_limit(
    model: Any, micro_batch: TrainingBatch, count_tokens: Callable[[TrainingBatch], int]
) -> TrainingBatch:
    """Return the first rows of a micro-batch within the larger of `MAX_FLOPS` and `MIN_TOKENS`.

    The result has at least the first row or pair.
    """
    per_token = forward_and_backward_flops(model, tokens=1, head_tokens=1)
    most = max(MIN_TOKENS, int(MAX_FLOPS / per_token))
    ids = micro_batch.pair_ids
    group = 1 if ids is None else int((ids == ids[0]).sum())  # rows of a pair stay together
    rows = len(micro_batch)
    while rows > group and count_tokens(_first_rows(micro_batch, rows)) > most:
        rows = max(group, rows // 2 // group * group)
    return _first_rows(micro_batch, rows)


def _first_rows(batch: TrainingBatch, rows: int) -> TrainingBatch:
    return batch.select(torch.arange(rows, device=batch.tokens.device))


def measure_decoding_step(model: Any, *, rows: int, tokens: int, sampling: SamplingParams) -> float:
    """Return the seconds of one decoding step of the engine in this process.

    Args:
        model: Causal model of the run.
        rows: Number of rows that are decoded together.
        tokens: Number of tokens in the cache of each row.
        sampling: Sampling parameters of the run.
    """
    total = count_blocks(model)
    size = max(1, parameter_bytes(model.parameters()) // total)
    larger = min(total, max(2, math.ceil(DECODING_BYTES / size)))
    counts = [total] if larger == total else [larger // 2, larger]
    measure = functools.partial(_decoding_seconds, rows=rows, tokens=tokens, sampling=sampling)
    try:
        seconds = [measure(_with_first_blocks(model, count)) for count in counts]
    except UNSUPPORTED_ERRORS:  # the code of the model needs all blocks
        counts, seconds = [total], [measure(model)]
    if len(counts) == 1:
        return seconds[0]
    block = max(0.0, (seconds[1] - seconds[0]) / (counts[1] - counts[0]))
    return seconds[1] + (total - larger) * block


def _decoding_seconds(model: Any, *, rows: int, tokens: int, sampling: SamplingParams) -> float:
    """Return the median seconds of a decoding step; see `measure_decoding_step`."""
    engine = ContinuousEngine(model, max_rows=rows)
    prompt = [1 + i % 7 for i in range(max(1, tokens))]  # equal for all rows: computed once
    engine.submit(
        [Request(row, prompt, DECODING_STEPS + 3, (0, row), sampling) for row in range(rows)]
    )
    for _ in range(2):  # the prefill, and a decoding step that is not counted
        engine.poll()
    seconds = []
    for _ in range(DECODING_STEPS):
        start = time.perf_counter()
        engine.poll()
        seconds.append(time.perf_counter() - start)
    engine.reset()
    return statistics.median(seconds)


def optimizer_seconds_per_weight(model: Any, *, name: str) -> float:
    """Return the seconds of an optimizer step, with the norm of the gradients, per trained weight.

    The result is 0 if no weight is trained.

    Args:
        model: Model of the run.
        name: Name of the optimizer.
    """
    weights, count = [], 0
    for parameter in model.parameters():
        if parameter.requires_grad and count < OPTIMIZER_ELEMENTS:
            weights.append(nn.Parameter(parameter.detach().clone()))
            count += parameter.numel()
    if not weights:
        return 0.0
    optimizer = make_optimizer(name, weights, OptimizerSettings(learning_rate=1e-6))

    def step() -> None:
        optimizer.clip_at_next_step(1.0)
        optimizer.step()

    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-4)
    return _median_seconds(step)[0] / count


def _median_seconds(*functions: Callable[[], object]) -> list[float]:
    """Return the median duration of each function, after one call that is not counted.

    The calls of the functions alternate, so that a changing load of the machine affects all of
    them.
    """
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    while len(times[0]) < MIN_REPEATS or (
        sum(map(sum, times)) < MEASURE_SECONDS and len(times[0]) < 20
    ):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            _wait_for_device()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def _wait_for_device() -> None:
    """Wait until the accelerator has finished, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
