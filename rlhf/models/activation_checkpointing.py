"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174) of transformer blocks.

Only the inputs of each block are kept for the backward pass, which computes the block again.
Transformers' own option has an effect only in training mode. This toolkit trains in evaluation
mode, because most losses must not use dropout.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhf.models.architecture import blocks_of


def checkpoint_activations(trunk: nn.Module) -> None:
    """Recompute the activations of a decoder's blocks in backward passes from now on.

    Deep copies of the decoder do the same. Forward passes without gradients are unchanged.

    Raises:
        UserError: The decoder has no list of blocks.
    """
    for block in blocks_of(trunk):
        block.forward = types.MethodType(_checkpointed_forward, block)


def _checkpointed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(self).forward, self, **kwargs)
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)
