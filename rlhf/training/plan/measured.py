"""Sizes and speeds of a loaded model, which the estimates of all training commands need."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms.batch import TrainingBatch
from rlhf.models.architecture import trunk_of, unwrap_peft
from rlhf.models.policy import Policy
from rlhf.runs.launch import trim_heap
from rlhf.runs.profiling import resident_bytes
from rlhf.training.plan.calibration import PassSpeed, measure_passes
from rlhf.training.plan.memory import HeadSize, PassSize, TrainingState, onednn_kernel_bytes
from rlhf.training.plan.tracing import formula_pass_size, traced_pass_size
from rlhf.training.reward_models.trainer import TrainableRewardModel


def overhead_bytes(state: TrainingState, device: torch.device) -> float:
    """Return the bytes of this process without the tensors of the training state.

    The trainer of the run exists, and no step has been taken. On a CPU, freed memory that the
    allocator keeps is not included, because training uses it again. On a GPU, the result contains
    all memory of the device in use, also that of other programs, except the tensors of this
    process.
    """
    if device.type == "cuda":  # the context, the libraries, and other programs
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_allocated(device)
    tensors = state.weights + state.master_weights + state.reference + state.critic + state.rewards
    tensors += state.policy_copy
    trim_heap()
    return max(0.0, resident_bytes() - tensors)


def onednn_kernel_cache_bytes(model: Any, passes: int) -> int:
    """Return the bytes of the kernels that oneDNN keeps; 0 unless the model is bfloat16 on a CPU.

    Args:
        model: Model of the run.
        passes: Number of passes of the run. All are assumed to have different numbers of tokens.
    """
    if model.dtype != torch.bfloat16 or model.device.type != "cpu":
        return 0
    shapes = {p.shape for p in model.parameters() if p.dim() == 2}
    return onednn_kernel_bytes(len(shapes), passes)


def count_computed_tokens(wrapper: Any, batch: TrainingBatch) -> int:
    """Return the number of tokens that the decoder of a policy or reward model computes."""
    return wrapper.count_computed_tokens(batch.tokens, batch.attention_mask)


def decoder_pass_size(model: Any, batch: TrainingBatch) -> PassSize:
    """Return the sizes of the passes over a micro-batch, from a formula if tracing fails."""
    trunk = trunk_of(model)
    try:
        return traced_pass_size(trunk, batch.tokens.cpu(), batch.attention_mask.cpu())
    except Exception:  # the code of the model reads values, which fake tensors do not have
        return formula_pass_size(trunk, batch.tokens.numel())


def head_size(model: Any, tokens: int) -> HeadSize | None:
    """Return the sizes of the output head for a number of tokens; None for a reward model."""
    head = unwrap_peft(model).get_output_embeddings()
    if head is None:
        return None
    weight = head.weight
    return HeadSize(
        vocabulary=weight.shape[0],
        width=weight.shape[1],
        tokens=tokens,
        itemsize=weight.element_size(),
        trained=weight.requires_grad,
    )


def measure_training_pass_speeds(
    wrapper: Any, batch: TrainingBatch, *, temperature: float = 1.0
) -> tuple[PassSpeed, PassSpeed]:
    """Measure the passes of a policy or reward model over a micro-batch; see `measure_passes`."""
    policy = isinstance(wrapper, Policy)
    critic = "none"
    if policy and wrapper.value_head is not None:
        critic = "shared" if wrapper.value_trunk is None else "separate"
    wrappers: dict[int, Any] = {}

    def run(model: Any, batch: TrainingBatch) -> Tensor:
        if id(model) not in wrappers:
            wrappers[id(model)] = (
                Policy(model, wrapper.tokenizer, critic=critic)
                if policy
                else TrainableRewardModel(model, wrapper.tokenizer)
            )
        short = wrappers[id(model)]
        if not policy:
            return short.score(batch.tokens, batch.attention_mask).sum()
        scored = short.score(
            batch.tokens, batch.attention_mask, batch.action_mask, temperature=temperature
        )
        values = 0.0 if scored.values is None else scored.values.sum()
        return scored.logprobs.sum() + values

    count_tokens = functools.partial(count_computed_tokens, wrapper)
    return measure_passes(wrapper.model, batch, run, count_tokens=count_tokens)
