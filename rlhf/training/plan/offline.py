"""Estimate a run of SFT, DPO or a reward model with the native engine."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics

import torch

from rlhf.algorithms.batch import TrainingBatch
from rlhf.training.dpo import DPOTrainer
from rlhf.training.optimizers import toolkit_optimizer_name
from rlhf.training.plan.batches import StepBatches, offline_batches
from rlhf.training.plan.calibration import optimizer_seconds_per_weight
from rlhf.training.plan.communication import add_communication
from rlhf.training.plan.duration import StepDuration, passes_seconds
from rlhf.training.plan.measured import (
    count_computed_tokens,
    decoder_pass_size,
    head_size,
    measure_training_pass_speeds,
    onednn_kernel_cache_bytes,
    overhead_bytes,
)
from rlhf.training.plan.memory import (
    Memory,
    TrainingState,
    best_model_restore_memory,
    checkpoint_memory,
    scoring_memory,
    training_state,
    update_memory,
)
from rlhf.training.plan.plan import Parallelism, Plan
from rlhf.training.plan.tracing import blocks_or_empty
from rlhf.training.supervised import SupervisedTrainer


def estimate_offline(trainer: SupervisedTrainer, parallelism: Parallelism) -> Plan:
    """Estimate the memory and the duration of a run from its trainer, before the first step."""
    model, processes = trainer.model.model, parallelism.processes
    name = toolkit_optimizer_name(trainer.options.optim)
    state = training_state(model, optimizer=name, blocks=blocks_or_empty(model))
    overhead = overhead_bytes(state, trainer.model.device)
    batches = offline_batches(trainer)
    count_tokens = functools.partial(count_computed_tokens, trainer.model)
    largest = max(batches.all_update_micro_batches(), key=count_tokens)
    per_step = math.ceil(max(len(step) for step in batches.steps) / processes)
    phases_of = functools.partial(
        _memory_by_phase, trainer, state, shards=parallelism.shards, micro_batches=per_step
    )
    update, forward = measure_training_pass_speeds(trainer.model, largest)
    passes = functools.partial(passes_seconds, count_tokens=count_tokens, processes=processes)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    duration = StepDuration(
        passes=statistics.fmean([passes(step, update) for step in batches.steps]),
        optimizer=trained / parallelism.shards * optimizer_seconds_per_weight(model, name=name),
    )
    duration, left_out = add_communication(
        duration,
        state,
        parallelism,
        trainer.model.device,
        updates=1,
        backward_passes=per_step,
    )
    reference = passes(batches.scoring, forward)
    return Plan(
        phases=phases_of(largest),
        bound=phases_of(_longest_possible_micro_batch(trainer)),
        duration=duration,
        num_steps=trainer.num_steps,
        parallelism=parallelism,
        speed=update,
        overhead=overhead,
        assumptions=_assumptions(trainer, batches, reference, left_out),
    )


def _memory_by_phase(
    trainer: SupervisedTrainer,
    state: TrainingState,
    batch: TrainingBatch,
    *,
    shards: int,
    micro_batches: int,
) -> dict[str, Memory]:
    """Return the memory of each phase, if ``batch`` is the largest micro-batch.

    Args:
        trainer: Trainer of the run.
        state: The training state.
        batch: The micro-batch.
        shards: Number of shards of the training state.
        micro_batches: Number of micro-batches of a process in a step.
    """
    model = trainer.model.model
    sizes = decoder_pass_size(model, batch)
    head = head_size(model, int(batch.action_mask.sum()))
    update = update_memory(state, sizes, head, shards=shards, micro_batches=micro_batches)
    kernels = onednn_kernel_cache_bytes(model, passes=trainer.num_steps * micro_batches)
    update = dataclasses.replace(update, kernels=kernels)
    return {
        "update": update,
        "evaluation": scoring_memory(state, sizes, head, shards=shards),
        "checkpoint": checkpoint_memory(state, shards=shards),
        "end of training": best_model_restore_memory(update, state, shards=shards),
    }


def _longest_possible_micro_batch(trainer: SupervisedTrainer) -> TrainingBatch:
    """Return a micro-batch of rows with max_length random tokens.

    All tokens except the first of each row are trained, because no state precedes the first token.
    """
    config, device = trainer.config, trainer.model.device
    group = 2 if isinstance(trainer, DPOTrainer) or trainer.with_margins else 1
    rows = max(group, config.micro_batch_size // group * group)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 200, (rows, config.max_length), generator=generator).to(device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    actions = mask.clone()
    actions[:, 0] = False
    return TrainingBatch(tokens=tokens, attention_mask=mask, action_mask=actions)


def _assumptions(
    trainer: SupervisedTrainer, batches: StepBatches, reference: float, left_out: list[str]
) -> list[str]:
    """Return the assumptions of an estimate.

    Args:
        trainer: Trainer of the run.
        batches: The batches of the first steps.
        reference: Seconds of the log-probabilities of a reference for one batch.
        left_out: What the duration leaves out, besides evaluations and checkpoints.
    """
    lines = [
        f"average: the time of a step is the mean over the first {len(batches.steps)} batches; the "
        "memory is that of the largest of their micro-batches",
        f"the time does not include {', '.join(['evaluations', 'checkpoints', *left_out])}",
    ]
    if isinstance(trainer, DPOTrainer):
        lines.append(
            "the log-probabilities of the reference are computed once, before the first step, in "
            f"about {reference:.2g} s for each batch of the first epoch"
        )
    return lines
