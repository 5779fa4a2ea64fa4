"""Shard the weights, gradients and optimizer states of models over processes with FSDP2.

`torch.distributed.fsdp.fully_shard` is applied to every transformer block and to one root module.
The root holds the remaining parameters, such as the embedding, the last norm and the output head.
Gradients are summed over the processes, without a division, because a loss is already divided by a
count over the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from rlhf.models.architecture import blocks_of
from rlhf.models.sharding.deferred import DeferredWeights
from rlhf.models.sharding.tensors import tensor_from_local_rows

Outputs = TypeVar("Outputs")


class _Root(nn.Module):
    """Root of the sharded modules. Its forward pass calls a function."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, function: Callable[[], Outputs]) -> Outputs:
        return function()


class ShardedModules:
    """Modules whose weights are sharded over all processes.

    Outside `whole_weights`, the weights of a block are whole only while the block is computed, and
    the weights of the root are whole in `run`, and after it until the end of the backward pass. At
    other times, the parameters of the modules are `DTensor` objects with the rows of this process.

    Args:
        modules: Name -> module. Weights that are not loaded are read from ``deferred``.
        decoders: The decoders of the modules, whose blocks are sharded separately.
        replicated: Parameters that are not sharded, such as adapters. FSDP does not sum their
            gradients over the processes. Parameters with fewer rows than processes, or of another
            dtype than most parameters, are not sharded either.
        device: Device of the weights.
        deferred: Source of the weights that are not loaded, or None if all weights are loaded.
        prefixes: Name of a module -> prefix of the names of its weights in ``deferred``.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        decoders: Iterable[nn.Module],
        *,
        replicated: Iterable[nn.Parameter],
        device: torch.device,
        deferred: DeferredWeights | None = None,
        prefixes: Mapping[str, str] | None = None,
    ) -> None:
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        self.root: Any = _Root(modules)
        parameters = list(self.root.parameters())
        ignored = set(replicated) | _unshardable_parameters(parameters, num_processes=mesh.size())
        options = {
            "mesh": mesh,
            "ignored_params": ignored,
            # The sum over the processes is as precise as the sum in one process.
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=_reduction_dtype(parameters)),
        }
        blocks = [block for decoder in decoders for block in blocks_of(decoder)]
        for block in blocks:
            fully_shard(block, **options)
        fully_shard(self.root, **options)
        self.units: list[Any] = [m for m in self.root.modules() if isinstance(m, FSDPModule)]
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)
            # A plain sum: FSDP would otherwise average with Gloo, and multiply before the sum with
            # NCCL, which round differently.
            unit.set_force_sum_reduction_for_comms(True)
            # An expert may have tokens in some processes only, so the gradients of parameters
            # without tokens are reduced too.
            unit.set_reduce_scatter_unused_params(_has_expert_modules(unit), recurse=False)
        if deferred is not None:
            for name, module in modules.items():
                prefix = (prefixes or {}).get(name, "")
                materialize_parameters(module, deferred, prefix=prefix, mesh=mesh, device=device)
        with torch.no_grad():
            self.run(lambda: None)  # FSDP completes its initialization in the first forward pass

    def run(self, function: Callable[[], Outputs]) -> Outputs:
        """Return the result of a function that runs the modules.

        Every process must call this method.

        Args:
            function: Function whose result is a tensor or a (named) tuple of tensors.
        """
        outputs = self.root(function)
        if not torch.is_grad_enabled():  # without a backward pass, the root would stay whole
            self.root.reset_iter_state()
        return outputs

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Return a context manager in which each process holds the whole weights.

        Every process must enter it. Within the context, forward passes need no communication, so
        the processes can make different numbers of them. Gradients cannot be computed.
        """
        blocks = [unit for unit in self.units if unit is not self.root]
        for unit in self.units:
            unit.unshard()
        for block in blocks:
            block.set_reshard_after_forward(False, recurse=False)
        try:
            with torch.no_grad():
                yield
        finally:
            for block in blocks:
                block.set_reshard_after_forward(True, recurse=False)
            self.root.reset_iter_state()


@torch.no_grad()
def materialize_parameters(
    module: nn.Module,
    source: DeferredWeights,
    *,
    prefix: str,
    mesh: DeviceMesh,
    device: torch.device,
) -> None:
    """Replace the parameters of a module on the meta device by parameters with weights.

    Args:
        module: A module to which `fully_shard` has been applied.
        source: The weights.
        prefix: Prefix of the names of the weights in ``source``.
        mesh: Mesh of the processes.
        device: Device of the new parameters.
    """
    filled: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if id(parameter) not in filled:  # tied weights are one parameter of several modules
                full_name = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
                source_rows = source.rows_of_process(full_name, parameter, mesh)
                rows = torch.empty_like(source_rows, device=device).copy_(source_rows)
                value = tensor_from_local_rows(parameter, rows)
                filled[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            setattr(owner, name, filled[id(parameter)])


def _unshardable_parameters(
    parameters: Iterable[nn.Parameter], *, num_processes: int
) -> set[nn.Parameter]:
    """Return the parameters that FSDP cannot shard together with the other parameters."""
    parameters = list(parameters)
    sizes: dict[torch.dtype, int] = {}
    for parameter in parameters:
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    main = max(sizes, key=lambda dtype: sizes[dtype])
    return {p for p in parameters if p.dtype != main or p.dim() == 0 or len(p) < num_processes}


def _reduction_dtype(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    """Return the dtype in which gradients are summed: float32, or float64 for a float64 model."""
    wide = torch.float32
    for parameter in parameters:
        if parameter.is_floating_point():
            wide = torch.promote_types(wide, parameter.dtype)
    return wide


def _has_expert_modules(unit: nn.Module) -> bool:
    return any("experts" in name.split(".") for name, _ in unit.named_parameters())
