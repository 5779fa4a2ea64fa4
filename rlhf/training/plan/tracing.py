"""Count the bytes of the tensors that the passes of a decoder allocate, without computing them.

The passes run on fake tensors, which have a shape, a dtype and a device but no memory. The code
that runs is that of training, so the count includes the effects of adapters, packed rows and
activation checkpointing. If all blocks of the decoder have the same shapes and attention, only the
first blocks are run, because every block saves equally many bytes.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.errors import UserError
from rlhf.models.architecture import blocks_of, text_config, trunk_of
from rlhf.models.fast.packing import attention_tiles_of, pack, packs_rows, states_of_packed_rows
from rlhf.models.trainable import copy_model
from rlhf.training.plan.memory import PassSize


class LiveByteCounter(TorchDispatchMode):
    """Counts the bytes of the tensors that operations allocate and that still exist.

    Args:
        known: Tensors that exist before, and are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count the storages of its outputs."""
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                self._count(output.untyped_storage())
        return outputs

    def reset_peak(self) -> None:
        """Set the peak to the current number of bytes."""
        self.peak = self.live

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed, unless it is counted or known already."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted:
            return
        self._counted.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def remove() -> None:
            self._counted.discard(key)
            self.live -= size

        weakref.finalize(storage, remove).atexit = False


def copy_with_first_blocks(module: Any, trunk: nn.Module, count: int, replace: Any = None) -> Any:
    """Return a copy of a module with only the first blocks of its decoder.

    Args:
        module: Model, or its decoder.
        trunk: Decoder of the module.
        count: Number of blocks.
        replace: Function that returns the copy of a parameter or buffer. By default, the tensors of
            the blocks are copied, and the others are shared.
    """
    blocks = blocks_of(trunk)
    (container,) = (m for m in trunk.modules() if isinstance(m, nn.ModuleList) and [*m] == blocks)
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        memo[id(tensor)] = tensor if replace is None else replace(tensor)
    if replace is None:
        for block in blocks[:count]:
            for tensor in [*block.parameters(), *block.buffers()]:
                del memo[id(tensor)]
    memo[id(container)] = nn.ModuleList()
    short = copy_model(module, memo)
    memo[id(container)].extend(copy.deepcopy(block, memo) for block in blocks[:count])
    return short


def blocks_or_empty(model: Any) -> list[nn.Module]:
    """Return the blocks of a model's decoder; an empty list if it has no list of blocks."""
    try:
        return blocks_of(trunk_of(model))
    except UserError:
        return []


def has_equal_blocks(trunk: nn.Module) -> bool:
    """Return whether all blocks of a decoder have the same shapes and kind of attention."""
    shapes = {
        tuple((name, p.shape) for name, p in block.named_parameters()) for block in blocks_of(trunk)
    }
    kinds = set(getattr(text_config(trunk), "layer_types", None) or ())
    return len(shapes) == 1 and len(kinds) <= 1


def traced_pass_size(trunk: Any, tokens: Tensor, attention_mask: Tensor) -> PassSize:
    """Return the sizes of the passes of a decoder over a micro-batch.

    Args:
        trunk: Decoder in the mode and with the fast paths of training.
        tokens: [B, T] on the CPU, padded on the right.
        attention_mask: [B, T], True for tokens that are not padding.
    """
    total = len(blocks_of(trunk))
    if total < 3 or not has_equal_blocks(trunk):
        return _trace_first_blocks(trunk, total, tokens, attention_mask)
    one, two = (_trace_first_blocks(trunk, n, tokens, attention_mask) for n in (1, 2))
    saved = one.saved + (total - 1) * (two.saved - one.saved)
    return PassSize(saved, two.backward, two.forward)


def _trace_first_blocks(
    trunk: Any, num_blocks: int, tokens: Tensor, attention_mask: Tensor
) -> PassSize:
    """Count the bytes of the passes of the first blocks of a decoder."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            empty = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
            if isinstance(tensor, nn.Parameter):
                return nn.Parameter(empty, requires_grad=tensor.requires_grad)
        return empty

    short = copy_with_first_blocks(trunk, trunk, num_blocks, fake)
    states = _forward_pass_function(short, tokens, attention_mask)
    known = [*short.parameters(), *short.buffers(), tokens, attention_mask]
    with mode:
        with torch.no_grad(), LiveByteCounter(known) as counter:
            states()
        forward = counter.peak
        with LiveByteCounter(known) as counter:
            _run_backward(states())  # allocates all gradients, so that they are not counted below
            start = counter.live
            output = states()
            saved = counter.live - start
            counter.reset_peak()
            _run_backward(output)
            del output
    return PassSize(saved, max(0, counter.peak - start - saved), forward)


def _run_backward(output: Tensor) -> None:
    """Run a backward pass, unless no parameter of the decoder is trained."""
    if output.requires_grad:
        output.backward(torch.empty_like(output))


def _forward_pass_function(
    trunk: Any, tokens: Tensor, attention_mask: Tensor
) -> Callable[[], Tensor]:
    """Return a function without arguments that runs the forward pass of training."""
    if not packs_rows(trunk, attention_mask.sum(1)):
        return lambda: trunk(input_ids=tokens, use_cache=False).last_hidden_state
    packed = pack(tokens, attention_mask)
    layout = attention_tiles_of(packed, trunk)
    return lambda: states_of_packed_rows(trunk, packed, layout, tied=None)


def formula_pass_size(trunk: Any, tokens: int) -> PassSize:
    """Return the sizes of the passes of a common transformer.

    Without recomputation, the activations of one token in one layer need about 34 bytes per hidden
    dimension in a 16-bit dtype. This equals 17 values of the model's dtype (Korthikanti et al.
    2022, arXiv:2205.05198, eq. 1 without the attention term).
    """
    config, itemsize = text_config(trunk), trunk.dtype.itemsize
    layer = 17 * itemsize * tokens * config.hidden_size
    return PassSize(layer * config.num_hidden_layers, layer, layer)
