"""Apply the time-step limits of state-space layers in single-token passes.

Transformers' Mamba 2 layers clamp the time step in passes over several tokens, but not in passes
over one token. For models with limits (Nemotron-H, Zamba 2), the distribution in sampling would
therefore differ from the distribution in training.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


def mixers_with_time_step_limits(trunk: nn.Module) -> list[Any]:
    """Return the state-space layers whose limits of the time step are not (0, inf)."""
    return [
        module
        for module in trunk.modules()
        if all(hasattr(module, name) for name in ("time_step_limit", "dt_bias", "in_proj"))
        and tuple(module.time_step_limit) != (0.0, math.inf)  # type: ignore[arg-type]
    ]


@contextlib.contextmanager
def clamped_time_steps(mixers: Sequence[Any]) -> Iterator[None]:
    """Return a context manager in which the input projections of these layers clamp time steps.

    The time step of each head is softplus(x + bias), where x is one of the last columns of the
    projection. The sum x + bias is clamped to the inverse softplus of the limits. In forward passes
    over several tokens, the layers clamp the time steps again, without effect.
    """
    handles = []
    for mixer in mixers:
        lowest, highest = mixer.time_step_limit
        lowest_sum = math.log(math.expm1(lowest)) if lowest > 0 else -math.inf
        highest_sum = math.log(math.expm1(highest)) if highest < math.inf else math.inf

        def clamp_time_step_columns(
            module: nn.Module,
            inputs: Any,
            projected: torch.Tensor,
            bias: torch.Tensor = mixer.dt_bias,
            bounds: tuple[float, float] = (lowest_sum, highest_sum),
        ) -> torch.Tensor:
            rest, steps = projected.split([projected.shape[-1] - len(bias), len(bias)], -1)
            return torch.cat([rest, (steps + bias).clamp(*bounds) - bias], -1)

        handles.append(mixer.in_proj.register_forward_hook(clamp_time_step_columns))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
