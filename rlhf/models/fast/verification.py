"""Enable those fast paths of a decoder that give the same results as its own forward pass.

The fast paths are fused RMSNorm and SwiGLU, attention over packed rows, and the separate lookup of
a tied embedding. They are compared with the model's own forward pass over one row at a time. The
inputs are rows of different lengths, rows with a common prefix, and rows longer than every window
if these are short enough. The hidden states and the gradients are compared. If they disagree, fast
paths are disabled for the model, one after another, until they agree. If the results of a padded
batch also disagree, each row is computed in a separate forward pass.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.architecture import (
    computation_change_lengths,
    configured_context_length,
    text_config,
    trunk_of,
    unwrap_peft,
    usable_context_length,
)
from rlhf.models.comparison import (
    FORWARD_ERRORS,
    evaluation_mode,
    forward_errors_as_user_errors,
    is_float32_or_wider,
    tolerance_of,
)
from rlhf.models.fast.packing import (
    enable_packing,
    flat_states_and_token_index,
    states_and_index_row_by_row,
    uses_packed_attention,
)
from rlhf.models.fast.patching import copy_replaced_forwards, restore_forward
from rlhf.models.fast.rmsnorm import patch_rmsnorm
from rlhf.models.fast.swiglu import patch_swiglu
from rlhf.models.fast.tied_embedding import (
    copy_embedding_check_result,
    disable_tied_embedding,
    make_tied_embedding,
)
from rlhf.models.output_head import copy_head_check_result
from rlhf.models.reduced_model import small_random_model_like

log = logging.getLogger(__name__)

# Factor of the tolerance for gradients, which accumulate more rounding errors than states.
GRADIENT_TOLERANCE_FACTOR = 3.0
# Gradients of parameters with up to this many elements are compared. These are, for example, the
# norms and biases of all layers, whose gradients depend on all later layers.
COMPARED_MAX_ELEMENTS = 2**14
# Maximum product of the number of parameters and the number of tokens of a compared row, on a CPU
# and on an accelerator.
CPU_WORK, ACCELERATOR_WORK = 2e10, 2e12
# Maximum length, in tokens, of the rows in the first batch, which fit into every window.
SHORT_ROW_TOKENS = 44

# Function of tokens [B, T] and mask [B, T] that returns the same as
# ``flat_states_and_token_index``.
StatesAndIndexFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ComparisonBatch:
    """Rows of different lengths, padded on the right."""

    tokens: Tensor  # [B, T]
    mask: Tensor  # [B, T], True for tokens that are not padding
    weights: Tensor  # [N, 1] loss weights of the states of the real tokens, row after row


@dataclass(frozen=True)
class StatesAndGradients:
    """Hidden states of all tokens except padding, and gradients of the compared parameters."""

    states: Tensor  # [N, D]
    gradients: list[Tensor | None]  # None for a parameter without a gradient


def enable_fast_paths(model: Any) -> bool:
    """Enable the fast paths of a model's decoder that agree with its own forward pass.

    The comparison is made once per model. Copies of the model keep the result. The model may have
    any head.

    Returns:
        Whether the model now packs rows.

    Raises:
        UserError: The model cannot be run, or the states or gradients differ even if all fast paths
            are disabled.
    """
    trunk = trunk_of(model)
    if not getattr(trunk, "fast_paths_verified", False):
        _enable_paths_verified_on_copy(model)
        trunk.fast_paths_verified = True
    return uses_packed_attention(trunk)


def enable_fast_paths_of_small_model(model: Any, small: Any) -> None:
    """Enable in a model without weights the fast paths that agree on a small model.

    Args:
        model: Model on the meta device.
        small: Small model of the same architecture, with weights.

    Raises:
        UserError: See `enable_fast_paths`, for the small model.
    """
    rows = max(max_comparison_tokens(small), 64)
    level = _enable_agreeing_paths(small, max_row_tokens=rows, num_disabled=0)
    trunk = trunk_of(model)
    copy_replaced_forwards(small, model)
    copy_head_check_result(small, model)
    copy_embedding_check_result(trunk_of(small), trunk)
    for _, disable in _disabling_steps(model)[:level]:
        disable()
    if level < 1:
        enable_packing(model)
    trunk.fast_paths_verified = True


def _enable_paths_verified_on_copy(model: Any) -> None:
    """Enable the fast paths that agree on the model, and on a small copy of it if necessary.

    The small copy is used in two cases: the comparison of rows longer than every window would take
    too long, or the model is in half precision, so that rounding can hide differences.
    """
    trunk = trunk_of(model)
    longest = max(computation_change_lengths(text_config(trunk)), default=0)
    affordable = max_comparison_tokens(model)
    num_disabled = 0
    if longest + 8 > affordable or not is_float32_or_wider(model):
        small = small_random_model_like(model)
        if small is not None:
            num_disabled = _enable_agreeing_paths(
                small, max_row_tokens=max(affordable, 64), num_disabled=0
            )
        elif longest + 8 > affordable:
            log.info(
                "%s: the comparison of fast paths does not include rows longer than %d tokens, but "
                "the model computes rows longer than %d tokens differently",
                type(unwrap_peft(model)).__name__,
                affordable,
                longest,
            )
    _enable_agreeing_paths(model, max_row_tokens=affordable, num_disabled=num_disabled)


def max_comparison_tokens(model: Any) -> int:
    """Return the maximum length, in tokens, of a row that is compared on this model."""
    work = CPU_WORK if model.device.type == "cpu" else ACCELERATOR_WORK
    weights = sum(p.numel() for p in trunk_of(model).parameters())
    return max(SHORT_ROW_TOKENS, int(work / max(weights, 1)))


def _disabling_steps(model: Any) -> Sequence[tuple[str, Callable[[], None]]]:
    """Return the name of each fast path and a function that disables it.

    The paths are in the order in which they are disabled.
    """
    trunk = trunk_of(model)

    def disable_packing() -> None:
        if uses_packed_attention(trunk):
            unwrap_peft(model).set_attn_implementation(trunk.attention_before_packing)
        trunk.never_packs = True

    def disable_row_batches() -> None:
        trunk.reads_single_rows = True

    return (
        ("packed rows", disable_packing),
        ("the tied embedding", lambda: disable_tied_embedding(trunk)),
        ("fused norms and gates", lambda: restore_forward(trunk)),
        ("batches of rows", disable_row_batches),
    )


def _enable_agreeing_paths(model: Any, *, max_row_tokens: int, num_disabled: int) -> int:
    """Enable all fast paths but the first ``num_disabled``; disable more until the results agree.

    Args:
        model: Model without fast paths.
        max_row_tokens: Maximum length of a compared row, in tokens.
        num_disabled: Number of paths of ``_disabling_steps`` that are not enabled.

    Returns:
        The number of disabled paths.

    Raises:
        UserError: The model cannot be run, or the results differ even if all paths are disabled.
    """
    trunk = trunk_of(model)

    def fast_states_and_index(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return flat_states_and_token_index(model, tokens, mask, tied=make_tied_embedding(model))

    levels = _disabling_steps(model)
    with evaluation_mode(unwrap_peft(model)):
        batches = _comparison_batches(trunk, max_row_tokens=max_row_tokens)
        trained = [p for p in trunk.parameters() if p.requires_grad]
        small = [p for p in trained if p.numel() <= COMPARED_MAX_ELEMENTS]
        with torch.set_grad_enabled(bool(small)):
            with forward_errors_as_user_errors(
                f"{type(unwrap_peft(model)).__name__} cannot be trained"
            ):
                one_by_one = functools.partial(states_and_index_row_by_row, trunk)
                expected = [_states_and_gradients(batch, one_by_one, small) for batch in batches]
            if num_disabled < 3:
                patch_rmsnorm(model)
                patch_swiglu(model)
            for _, disable in levels[:num_disabled]:
                disable()
            if num_disabled < 1:
                enable_packing(model)
            gap = 0.0
            for level in range(num_disabled, len(levels) + 1):
                try:
                    results = [
                        _states_and_gradients(batch, fast_states_and_index, small)
                        for batch in batches
                    ]
                    gap = max(
                        _gap_in_tolerances(a, b) for a, b in zip(results, expected, strict=True)
                    )
                except FORWARD_ERRORS:
                    gap = math.inf
                if gap <= 1:
                    return level
                if level < len(levels):
                    name, disable = levels[level]
                    log.info("%s is trained without %s", type(unwrap_peft(model)).__name__, name)
                    disable()
    raise UserError(
        f"{type(unwrap_peft(model)).__name__} is not supported: its hidden states or gradients in "
        "training differ from those of a forward pass over one row by "
        f"{gap:.2g} times the tolerance for rounding errors"
    )


def _comparison_batches(trunk: Any, *, max_row_tokens: int) -> list[ComparisonBatch]:
    """Make a batch of rows that fit into every window, and a batch with a longer row if possible.

    Two rows of the first batch have a common prefix.
    """
    config = text_config(trunk)
    limits = computation_change_lengths(config)
    context = usable_context_length(config)
    width = min([SHORT_ROW_TOKENS, context, max_row_tokens, *limits])
    generator = torch.Generator().manual_seed(0)

    def random_row(length: int) -> Tensor:
        return torch.randint(config.vocab_size, (length,), generator=generator)

    first = random_row(width)
    second = torch.cat([first[: max(1, width - 6)], random_row(2)])[:width]
    groups = [[first, second, random_row(max(1, width // 4))]]
    long = [n for n in limits if n + 8 <= min(max_row_tokens, configured_context_length(config))]
    if long:
        groups.append(
            [
                random_row(max(long) + 8),
                random_row(max(1, min(limits) // 2)),
                random_row(min(limits) + 3),
            ]
        )
    return [_padded_batch(rows, generator, trunk.device) for rows in groups]


def _padded_batch(
    rows: list[Tensor], generator: torch.Generator, device: torch.device
) -> ComparisonBatch:
    """Return rows as a batch on ``device``, with random loss weights."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    tokens[mask] = torch.cat(rows)
    weights = torch.randn(int(lengths.sum()), generator=generator)
    return ComparisonBatch(tokens.to(device), mask.to(device), weights.to(device)[:, None])


def _states_and_gradients(
    batch: ComparisonBatch, states_and_index_of: StatesAndIndexFunction, small_parameters: list[Any]
) -> StatesAndGradients:
    """Return the states of ``states_and_index_of``, and the gradients of ``small_parameters``."""
    states, index = states_and_index_of(batch.tokens, batch.mask)
    states = states[index[batch.mask]]
    gradients: list[Tensor | None] = []
    if small_parameters and states.requires_grad:
        waves = torch.cos(torch.arange(states.shape[1], device=states.device))
        loss = (states * (batch.weights * waves).to(states.dtype)).sum()
        gradients = list(torch.autograd.grad(loss, small_parameters, allow_unused=True))
    return StatesAndGradients(states.detach(), gradients)


def _gap_in_tolerances(result: StatesAndGradients, expected: StatesAndGradients) -> float:
    """Return the larger of the relative differences of states and gradients, in tolerances.

    Each relative difference is divided by its tolerance, so a result of at most 1 means agreement.
    """
    tolerance = tolerance_of(expected.states)
    gaps = [_relative_difference([result.states], [expected.states]) / tolerance]
    pairs = list(zip(result.gradients, expected.gradients, strict=True))
    if any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    gradients = [(a, b) for a, b in pairs if a is not None and b is not None]
    if gradients:
        ours, theirs = zip(*gradients, strict=True)
        gaps.append(_relative_difference(ours, theirs) / (GRADIENT_TOLERANCE_FACTOR * tolerance))
    return max(gaps)


def _relative_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the difference of two lists of tensors, relative to ``expected``.

    In float32, it is the largest absolute difference divided by the largest absolute element. In
    half precision, it is the mean absolute difference divided by the mean absolute element.
    """
    a, b = (torch.cat([x.double().flatten() for x in tensors]) for tensors in (actual, expected))
    difference = (a - b).abs()
    if not bool(difference.isfinite().all()):
        return float("inf")
    if is_float32_or_wider(expected[0]):
        return float(difference.max() / b.abs().max().clamp(min=1e-9))
    return float(difference.mean() / b.abs().mean().clamp(min=1e-9))
