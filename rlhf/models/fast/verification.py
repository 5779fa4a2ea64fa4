"""Which quick pieces a decoder is scored with: those that give what its own forward pass gives.

Fused norms and gates, attention over packed rows, and a tied table looked up apart each compute
what a family's own code computes, for the families they were written for. What a family does
besides cannot be read off it, so the whole is tried, as training will use it: ragged rows with
gradients, rows that begin alike, rows longer than every window of the model, all against one row at
a time by the model's own code. What disagrees is switched off for that model; rows are read one by
one where even padding changes them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.architecture import (
    limits_of,
    text_config,
    trunk_of,
    unwrap_peft,
    usable_context,
    whole_context,
)
from rlhf.models.checks import evaluating, is_precise
from rlhf.models.fast.packing import enable_packing, hidden_states, is_packed, restart_frequencies
from rlhf.models.fast.patching import restore
from rlhf.models.fast.rmsnorm import patch_rmsnorm
from rlhf.models.fast.swiglu import patch_swiglu
from rlhf.models.fast.tied_embedding import tied_embedding, without_tied_table
from rlhf.models.reduced_model import reduced_copy

log = logging.getLogger(__name__)

# Largest gaps that rounding explains: of states in float32, and in half precision of the mean.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1
# Gradients sum up more roundings.
GRADIENT = 3.0
# Parameters whose gradients are compared have at most so many elements: norms and biases of every
# layer, which see all that passes through the layers after them.
SMALL = 2**14
# Weights times tokens of one pass of the trial, on a CPU and on an accelerator.
WORK, ACCELERATED_WORK = 2e10, 2e12
# Tokens of the rows that fit into every window.
SHORT = 44

# What a pass that does not suit a model may raise.
FAILURES = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)

Read = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Ragged rows, padded on the right."""

    tokens: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    weights: Tensor  # [N, D] of the real tokens' states in the loss, row after row


@dataclass(frozen=True)
class Result:
    """States of the real tokens of a batch, and gradients of the small parameters."""

    states: Tensor  # [N, D]
    gradients: list[Tensor | None]


def enable_fast_paths(model: Any) -> bool:
    """Let a decoder, with any head, run by the quicker pieces that compute what its own do.

    Decided once per model; a copy of it keeps the decision.

    Returns:
        Whether the model packs from now on.

    Raises:
        UserError: not even one row at a time gives the model's own states.
    """
    trunk = trunk_of(model)
    if not getattr(trunk, "passes_decided", False):
        _decide(model)
        trunk.passes_decided = True
    return is_packed(trunk)


def _decide(model: Any) -> None:
    trunk = trunk_of(model)
    longest = max(limits_of(text_config(trunk)), default=0)
    affordable = affordable_tokens(model)
    start = 0
    if longest + 8 > affordable or not is_precise(model):
        small = reduced_copy(model)
        if small is not None:
            start = _first_right(small, limit=max(affordable, 64), start=0)
        elif longest + 8 > affordable:
            log.info(
                "%s: rows longer than %d tokens were not tried, its windows reach %d",
                type(unwrap_peft(model)).__name__,
                affordable,
                longest,
            )
    _first_right(model, limit=affordable, start=start)


def affordable_tokens(model: Any) -> int:
    """Length of the rows that may be read in the trial."""
    work = WORK if model.device.type == "cpu" else ACCELERATED_WORK
    weights = sum(p.numel() for p in trunk_of(model).parameters())
    return max(SHORT, int(work / max(weights, 1)))


def _levels(model: Any) -> Sequence[tuple[str, Callable[[], None]]]:
    """What is switched off from level to level."""
    trunk = trunk_of(model)

    def pad() -> None:
        if is_packed(trunk):
            unwrap_peft(model).set_attn_implementation(trunk.attention_before_packing)
        trunk.never_packs = True

    def alone() -> None:
        trunk.reads_alone = True

    return (
        ("packed rows", pad),
        ("the tied table", lambda: without_tied_table(trunk)),
        ("fused norms and gates", lambda: restore(trunk)),
        ("rows side by side", alone),
    )


def _first_right(model: Any, *, limit: int, start: int) -> int:
    """Switch quick pieces off until the states are the model's own; returns how many are off.

    Args:
        model: with none of them so far.
        limit: longest row that is tried.
        start: how many are off from the beginning.
    """
    trunk = trunk_of(model)
    levels = _levels(model)
    with evaluating(unwrap_peft(model)):
        batches = _batches(trunk, limit=limit)
        small = [p for p in trunk.parameters() if p.requires_grad and p.numel() <= SMALL]
        with torch.set_grad_enabled(bool(small)):
            try:
                expected = [_result(batch, _plainly(trunk), small) for batch in batches]
            except FAILURES as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"{type(unwrap_peft(model)).__name__} cannot be trained: {reason}"
                ) from error
            if start < 3:
                patch_rmsnorm(model)
                patch_swiglu(model)
            for _, switch_off in levels[:start]:
                switch_off()
            if start < 1:
                enable_packing(model)
            gap = 0.0
            for level in range(start, len(levels) + 1):
                try:
                    found = [_result(batch, _quickly(model), small) for batch in batches]
                    gap = max(_gap(a, b) for a, b in zip(found, expected, strict=True))
                except FAILURES:
                    gap = math.inf
                if gap <= 1:
                    return level
                if level < len(levels):
                    name, switch_off = levels[level]
                    log.info("%s: without %s", type(unwrap_peft(model)).__name__, name)
                    switch_off()
    tolerance = TOLERANCE if is_precise(model) else HALF_TOLERANCE
    raise UserError(
        f"{type(unwrap_peft(model)).__name__} is not supported: in training its states differ by "
        f"{gap * tolerance:.1e} of their size from those of a plain pass over one row"
    )


def _batches(trunk: Any, *, limit: int) -> list[Batch]:
    """Rows that begin alike and fit into every window, and rows longer than all of them."""
    config = text_config(trunk)
    limits = limits_of(config)
    context = usable_context(config)
    width = min([SHORT, context, limit, *limits])
    generator = torch.Generator().manual_seed(0)

    def row(length: int) -> Tensor:
        return torch.randint(config.vocab_size, (length,), generator=generator)

    first = row(width)
    alike = torch.cat([first[: max(1, width - 6)], row(2)])[:width]
    groups = [[first, alike, row(max(1, width // 4))]]
    long = [n for n in limits if n + 8 <= min(limit, whole_context(config))]
    if long:
        groups.append([row(max(long) + 8), row(max(1, min(limits) // 2)), row(min(limits) + 3)])
    return [_batch(rows, trunk, generator) for rows in groups]


def _batch(rows: list[Tensor], trunk: Any, generator: torch.Generator) -> Batch:
    device = trunk.device
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    tokens[mask] = torch.cat(rows)
    weights = torch.randn(int(lengths.sum()), generator=generator)
    return Batch(tokens.to(device), mask.to(device), weights.to(device)[:, None])


def _plainly(trunk: Any) -> Read:
    """One row at a time, by the model's own code."""

    def read(tokens: Tensor, mask: Tensor) -> Tensor:
        rows = []
        for row, kept in zip(tokens, mask, strict=True):
            restart_frequencies(trunk)
            rows.append(trunk(input_ids=row[None, kept], use_cache=False).last_hidden_state[0])
        return torch.cat(rows)

    return read


def _quickly(model: Any) -> Read:
    """As training reads."""

    def read(tokens: Tensor, mask: Tensor) -> Tensor:
        states, index = hidden_states(model, tokens, mask, tied=tied_embedding(model))
        return states[index[mask]]

    return read


def _result(batch: Batch, read: Read, small: list[Any]) -> Result:
    states = read(batch.tokens, batch.mask)
    gradients: list[Tensor | None] = []
    if small and states.requires_grad:
        waves = torch.cos(torch.arange(states.shape[1], device=states.device))
        loss = (states * (batch.weights * waves).to(states.dtype)).sum()
        gradients = list(torch.autograd.grad(loss, small, allow_unused=True))
    return Result(states.detach(), gradients)


def _gap(found: Result, expected: Result) -> float:
    """Difference of two results in units of what rounding explains."""
    tolerance = TOLERANCE if is_precise(expected.states) else HALF_TOLERANCE
    gaps = [_difference([found.states], [expected.states]) / tolerance]
    pairs = list(zip(found.gradients, expected.gradients, strict=True))
    if any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    there = [(a, b) for a, b in pairs if a is not None and b is not None]
    if there:
        ours, own = zip(*there, strict=True)
        gaps.append(_difference(ours, own) / (GRADIENT * tolerance))
    return max(gaps)


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative to the size: the largest difference, or in half precision the mean."""
    ours, own = (torch.cat([x.double().flatten() for x in side]) for side in (found, expected))
    difference = (ours - own).abs()
    if not bool(difference.isfinite().all()):
        return float("inf")
    if is_precise(expected[0]):
        return float(difference.max() / own.abs().max().clamp(min=1e-9))
    return float(difference.mean() / own.abs().mean().clamp(min=1e-9))
