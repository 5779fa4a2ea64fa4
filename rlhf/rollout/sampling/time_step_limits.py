"""Apply the time-step limits of state-space layers in single-token passes.

Transformers' Mamba 2 layers clamp the time step in passes over several tokens, but not in passes
over one token. A sampler that decodes token by token would then sample from another distribution
than the one in training (Nemotron-H and Zamba 2 set a lower limit).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


def mixers_with_time_step_limits(trunk: nn.Module) -> list[Any]:
    """Return the layers whose time steps have a limit other than zero and infinity."""
    return [
        module
        for module in trunk.modules()
        if all(hasattr(module, name) for name in ("time_step_limit", "dt_bias", "in_proj"))
        and tuple(module.time_step_limit) != (0.0, math.inf)  # type: ignore[arg-type]
    ]


@contextlib.contextmanager
def clamped_time_steps(mixers: Sequence[Any]) -> Iterator[None]:
    """Return a context in which the projections of these layers clamp their time steps.

    The time step of each head is softplus(x + bias), where x is one of the last columns of the
    projection. The limits are applied to x + bias. Longer passes clamp again, without effect.
    """
    handles = []
    for mixer in mixers:
        lowest, highest = mixer.time_step_limit
        least = math.log(math.expm1(lowest)) if lowest > 0 else -math.inf
        most = math.log(math.expm1(highest)) if highest < math.inf else math.inf

        def limit(
            module: nn.Module,
            inputs: Any,
            projected: torch.Tensor,
            bias: torch.Tensor = mixer.dt_bias,
            bounds: tuple[float, float] = (least, most),
        ) -> torch.Tensor:
            rest, steps = projected.split([projected.shape[-1] - len(bias), len(bias)], -1)
            return torch.cat([rest, (steps + bias).clamp(*bounds) - bias], -1)

        handles.append(mixer.in_proj.register_forward_hook(limit))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
