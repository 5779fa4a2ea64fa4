"""Helpers to compare two computations of a model: evaluation mode, tolerances, errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rlhf.errors import UserError

# Tolerances of relative differences of logits and states. In float32, the tolerance applies to the
# largest difference. In half precision, it applies to the mean difference, because rounding can
# route single tokens to different experts.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1

# Exceptions that a forward pass raises if it does not support its inputs.
FORWARD_ERRORS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def is_float32_or_wider(model: Any) -> bool:
    """Return whether the dtype of a model or of a tensor is float32 or float64."""
    return model.dtype in (torch.float32, torch.float64)


def tolerance_of(model: Any) -> float:
    """Return the tolerance of relative differences for the dtype of a model or of a tensor."""
    return TOLERANCE if is_float32_or_wider(model) else HALF_TOLERANCE


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Return a context manager that sets evaluation mode and restores the modes at its end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def forward_errors_as_user_errors(problem: str) -> Iterator[None]:
    """Return a context manager in which a failed forward pass raises a UserError.

    Raises:
        UserError: The forward pass fails; the message is ``problem`` with the first line of the
            exception.
    """
    try:
        yield
    except FORWARD_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{problem}: {reason}") from error
