"""Estimate a run of an online algorithm."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from torch import nn

from rlhf.models.architecture import (
    ATTENTION,
    BOTH,
    cache_kinds_and_state_counts,
    text_config,
    trunk_of,
    unwrap_peft,
)
from rlhf.rollout.sampling.base import SamplingParams
from rlhf.rollout.sampling.decoder import (
    FUSED_FAMILIES,
    FusedDecoder,
    fused_weight_bytes,
    make_fastest_matching_decoder,
)
from rlhf.rollout.sampling.kv_cache import CAPACITY_MULTIPLE
from rlhf.training.plan.batches import (
    StepBatches,
    num_sampled_groups,
    play_and_make_online_batches,
)
from rlhf.training.plan.calibration import (
    PassSpeed,
    measure_decoding_step,
    optimizer_seconds_per_weight,
)
from rlhf.training.plan.communication import add_communication
from rlhf.training.plan.duration import StepDuration, passes_seconds, sampling_seconds
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
    checkpoint_memory,
    kv_cache_bytes,
    sampling_memory,
    scoring_memory,
    training_state,
    update_memory,
)
from rlhf.training.plan.plan import Parallelism, Plan
from rlhf.training.plan.tracing import blocks_or_empty, copy_with_first_blocks


def estimate_online(trainer: Any, parallelism: Parallelism) -> Plan:
    """Estimate the memory and the duration of a run from its trainer, before the first step.

    Args:
        trainer: An ``OnlineTrainer``, which must not train afterwards.
        parallelism: The processes of the run.
    """
    state = _online_training_state(trainer)
    # The check of the sampler has freed copies of weights, and the next phases use their memory.
    freed = _copied_weight_bytes(trainer.policy.model) if trainer.external_engine is None else 0
    overhead = max(0.0, overhead_bytes(state, trainer.policy.device) - freed)
    watch = trainer.collector.watch  # differs from `trainer.stopwatch` with max_staleness
    watch.pop_time_metrics()
    batches = play_and_make_online_batches(trainer)
    played = num_sampled_groups(trainer) * trainer.algorithm.settings.group_size
    environments = watch.pop_time_metrics().get("time/environments", 0.0)
    environments *= trainer.config.episodes_per_step / played
    duration, speed = _duration_without_environments(trainer, batches, parallelism)
    duration = dataclasses.replace(duration, environments=environments / parallelism.processes)
    duration, left_out = add_communication(
        duration,
        state,
        parallelism,
        trainer.policy.device,
        **_numbers_of_passes(trainer, batches, parallelism.processes),
    )
    left_out = ["evaluations", "checkpoints", "rewards without a model", *left_out]
    assumptions = [
        "upper bound: every completion has rollout.max_new_tokens tokens; the prompts are those of "
        "the first episodes",
        f"the time does not include {', '.join(left_out)}",
    ]
    if trainer.external_engine is not None:
        assumptions.append("the time of sampling with an external engine is not estimated")
    if trainer.policy_copy is not None:
        assumptions.append(
            "upper bound: with rollout.max_staleness, the parts of a step before the update run "
            "during earlier updates if they use another processor"
        )
    return Plan(
        phases=_memory_by_phase(trainer, state, batches, parallelism),
        bound={},
        duration=duration,
        num_steps=trainer.config.num_steps,
        parallelism=parallelism,
        speed=speed,
        overhead=overhead,
        assumptions=assumptions,
    )


def _online_training_state(trainer: Any) -> TrainingState:
    """Return the training state of an online run."""
    policy, reference = trainer.policy, trainer.reference
    if reference is not None:  # with adapters, the reference is the policy itself
        reference = None if reference.policy is policy else reference.policy.model
    return training_state(
        policy.model,
        optimizer=trainer.config.optimizer.name,
        blocks=blocks_or_empty(policy.model),
        value_head=policy.value_head,
        critic=policy.value_trunk,
        reference=reference,
        rewards=_reward_models(trainer),
        copied=trainer.policy_copy is not None,
    )


def _reward_models(trainer: Any) -> list[nn.Module]:
    """Return the models of the learned rewards."""
    return [c.model for reward in trainer.all_rewards for c in reward.learned_rewards()]


def _decoded_rows(trainer: Any, parallelism: Parallelism) -> int:
    """Return the number of rows that one process decodes together."""
    per_process = trainer.config.episodes_per_step // parallelism.processes
    return max(1, min(trainer.config.rollout.parallel, per_process))


def _memory_by_phase(
    trainer: Any, state: TrainingState, batches: StepBatches, parallelism: Parallelism
) -> dict[str, Memory]:
    """Return the memory of each phase of a step."""
    policy, shards = trainer.policy, parallelism.shards
    passes = [*batches.all_update_micro_batches(), *batches.scoring]
    count_tokens = functools.partial(count_computed_tokens, policy)
    largest = max(passes, key=count_tokens)
    sizes = decoder_pass_size(policy.model, largest)
    head = head_size(policy.model, max(int(batch.action_mask.sum()) for batch in passes))
    mini_batches = trainer.algorithm.settings.num_minibatches * parallelism.processes
    phases = {
        "scoring": scoring_memory(state, sizes, head, shards=shards),
        "update": update_memory(
            state,
            sizes,
            head,
            shards=shards,
            decoders=1 if policy.value_trunk is None else 2,
            micro_batches=math.ceil(len(batches.all_update_micro_batches()) / mini_batches),
        ),
        "checkpoint": checkpoint_memory(state, shards=shards),
    }
    if trainer.external_engine is None:
        phases["sampling"] = _sampling_memory(
            policy.model,
            state,
            batches,
            rows=_decoded_rows(trainer, parallelism),
            forward_per_token=sizes.forward / count_tokens(largest),
            shards=shards,
        )
    kernels = onednn_kernel_cache_bytes(policy.model, passes=len(passes) * trainer.config.num_steps)
    return {name: dataclasses.replace(m, kernels=kernels) for name, m in phases.items()}


def _sampling_memory(
    model: Any,
    state: TrainingState,
    batches: StepBatches,
    *,
    rows: int,
    forward_per_token: float,
    shards: int,
) -> Memory:
    """Return the memory of sampling with the engine in this process.

    Args:
        model: Causal model.
        state: The training state.
        batches: The episodes of a step.
        rows: Number of rows that are decoded together.
        forward_per_token: Bytes of a forward pass without gradients per token.
        shards: Number of processes that share the training state.
    """
    config = text_config(unwrap_peft(model))
    kinds = cache_kinds_and_state_counts(config)
    layers = config.num_hidden_layers
    if kinds is not None:
        layers = sum(kind in (ATTENTION, BOTH) for kind, _ in kinds)
    heads, itemsize = config.num_attention_heads, model.dtype.itemsize
    cache = kv_cache_bytes(
        rows=rows,
        tokens=-(-batches.longest // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE,
        layers=layers,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        itemsize=itemsize,
    )
    # The logits, in their own dtype and in float32, their exponentials, and a padded copy of these.
    per_logit = itemsize + (4 if itemsize < 4 else 0) + 8
    return sampling_memory(
        state,
        kv_cache=cache + _copied_weight_bytes(model),
        logits=rows * config.vocab_size * per_logit,
        temporary=forward_per_token * min(batches.prompt_tokens, rows * batches.longest),
        shards=shards,
    )


def _copied_weight_bytes(model: Any) -> int:
    """Return the bytes of the weights that the decoder of the sampler copies, or 0."""
    if text_config(unwrap_peft(model)).model_type not in FUSED_FAMILIES:
        return 0
    short = copy_with_first_blocks(model, trunk_of(model), 1)
    return (
        fused_weight_bytes(model)
        if isinstance(make_fastest_matching_decoder(short), FusedDecoder)
        else 0
    )


def _duration_without_environments(
    trainer: Any, batches: StepBatches, parallelism: Parallelism
) -> tuple[StepDuration, PassSpeed]:
    """Return the duration of a step without the environments, and the speed of the passes."""
    config, policy, settings = trainer.config, trainer.policy, trainer.algorithm.settings
    processes, count_tokens = (
        parallelism.processes,
        functools.partial(count_computed_tokens, policy),
    )
    largest = max([*batches.all_update_micro_batches(), *batches.scoring], key=count_tokens)
    update, forward = measure_training_pass_speeds(
        policy, largest, temperature=config.rollout.temperature
    )
    passes = functools.partial(passes_seconds, count_tokens=count_tokens, processes=processes)
    scored_models = 1 if trainer.reference is None else 2
    trained = sum(p.numel() for p in policy.parameters()) / parallelism.shards
    steps = settings.num_epochs * settings.num_minibatches
    duration = StepDuration(
        sampling=_sampling_seconds(trainer, batches, forward, parallelism),
        rewards=_reward_seconds(trainer, forward, batches) / processes,
        scoring=scored_models * passes(batches.scoring, forward),
        passes=settings.num_epochs * sum(passes(step, update) for step in batches.steps),
        optimizer=steps
        * trained
        * optimizer_seconds_per_weight(policy.model, name=config.optimizer.name),
    )
    return duration, update


def _numbers_of_passes(trainer: Any, batches: StepBatches, processes: int) -> dict[str, int]:
    """Return the numbers of updates and passes of a step, for `communication_seconds`."""
    settings = trainer.algorithm.settings
    scored_models = 1 if trainer.reference is None else 2
    shares = [math.ceil(len(step) / processes) for step in batches.steps]
    return {
        "updates": settings.num_epochs * settings.num_minibatches,
        "backward_passes": settings.num_epochs * sum(shares),
        "forward_passes": scored_models * math.ceil(len(batches.scoring) / processes),
    }


def _sampling_seconds(
    trainer: Any, batches: StepBatches, speed: PassSpeed, parallelism: Parallelism
) -> float:
    """Return the duration of sampling in this process; 0 with an external engine."""
    if trainer.external_engine is not None:
        return 0.0
    rollout, rows = trainer.config.rollout, _decoded_rows(trainer, parallelism)
    step = measure_decoding_step(
        trainer.policy.model,
        rows=rows,
        tokens=batches.longest - rollout.max_new_tokens // 2,
        sampling=SamplingParams(temperature=rollout.temperature),
    )
    return sampling_seconds(
        sampled_tokens=batches.sampled_tokens / parallelism.processes,
        rows=rows,
        step_seconds=step,
        prompt_tokens=batches.prompt_tokens / parallelism.processes,
        speed=speed,
    )


def _reward_seconds(trainer: Any, speed: PassSpeed, batches: StepBatches) -> float:
    """Return the duration of the forward passes of learned rewards over all episodes.

    A reward model is assumed to need as many seconds per weight as the policy.
    """
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches.scoring)
    per_weight = speed.per_token / _num_block_weights(trainer.policy.model)
    weights = sum(_num_block_weights(model) for model in _reward_models(trainer))
    return per_weight * weights * tokens


def _num_block_weights(model: Any) -> int:
    """Return the number of weights in the transformer blocks of a model; 1 without blocks."""
    return sum(p.numel() for block in blocks_or_empty(model) for p in block.parameters()) or 1
