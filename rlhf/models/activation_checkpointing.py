"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174) of transformer blocks.

Only the inputs of each block are kept for the backward pass, which computes the block again.
Transformers' own option has an effect only in training mode. This toolkit trains in evaluation
mode, except if SFT or a reward model uses dropout, because other losses must not use dropout.
"""

from __future__ import annotations

import functools
import itertools
import types
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhf.models.architecture import blocks_of
from rlhf.runs.launch import trim_heap

BLOCKS_PER_TRIM = 8
"""Number of computed blocks after which freed memory is returned to the system."""
_computed_blocks = itertools.count(1)


def checkpoint_activations(trunk: nn.Module) -> None:
    """Recompute the activations of a decoder's blocks in backward passes from now on.

    Deep copies of the decoder do the same. Forward passes without gradients are unchanged. On a
    CPU, the heap is trimmed before every `BLOCKS_PER_TRIM`-th computation of a block.

    Raises:
        UserError: The decoder has no list of blocks.
    """
    for block in blocks_of(trunk):
        block.forward = types.MethodType(_checkpointed_forward, block)


def _checkpointed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(self).forward, self, **kwargs)
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(
        functools.partial(_compute_block_and_trim_heap, forward), *args, use_reentrant=False
    )


def _compute_block_and_trim_heap(forward: Any, *args: Any) -> Any:
    """Compute a block, in the forward pass or again in the backward pass.

    Small objects that outlive a block, such as nodes of the autograd graph, fragment the heap. The
    freed memory is then not reused for the tensors of the next block. Without trimming, the process
    would grow to several times the memory that is in use at a time.
    """
    if next(_computed_blocks) % BLOCKS_PER_TRIM == 0 and args[0].device.type == "cpu":
        trim_heap()
    return forward(*args)
