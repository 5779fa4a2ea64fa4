"""Dtype, device and threads of models, and optimizers with float32 master weights."""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rlhf.common.launcher import launcher_number
from rlhf.models.sharding.tensors import local_part

# Minimum number of parameters for which bf16 matmuls save more time than the conversions cost.
BF16_MIN_PARAMS = 1_000_000

# Minimum number of parameters for which several threads speed up the matmuls.
MULTITHREAD_MIN_PARAMS = 10_000_000

# Number of elements that are updated at a time, which limits the memory of float32 gradients.
OPTIMIZER_CHUNK_ELEMENTS = 2**20

# torch's number of threads when this module was imported.
DEFAULT_THREADS = torch.get_num_threads()

# All loaded models that still exist. The largest one determines the number of threads.
_in_use: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def default_device() -> torch.device:
    """Return the CUDA device of this process, Apple's GPU (MPS, untested), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", launcher_number("LOCAL_RANK"))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@functools.cache
def has_native_bf16(device: torch.device) -> bool:
    """Return whether the device is known to have hardware support for bf16 matmuls.

    Support is detected for CUDA devices, and for x86 processors on Linux.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and sys.platform.startswith("linux"):
        flags = Path("/proc/cpuinfo").read_text().split()
        return "amx_bf16" in flags or "avx512_bf16" in flags
    return False


def choose_dtype(name: str, num_parameters: int, device: torch.device) -> torch.dtype:
    """Return the dtype for a value of ``model.dtype``.

    Args:
        name: "auto", "float32", "bfloat16" or "float16".
        num_parameters: Number of parameters of the model. If it is at least a million and the
            device supports bf16 matmuls in hardware, "auto" means bfloat16. Otherwise, it means
            float32.
        device: Device of the model.
    """
    if name == "auto":
        fast = has_native_bf16(device) and num_parameters >= BF16_MIN_PARAMS
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, name)


def choose_thread_count(num_parameters: int, device: torch.device) -> int:
    """Return the number of threads for torch: one for a small model on a CPU, else the default.

    The matmuls of a small model take microseconds. Distributing them over threads takes more time
    than it saves, especially on a busy machine. If ``OMP_NUM_THREADS`` is set, the default is used.
    """
    if (
        device.type == "cpu"
        and num_parameters < MULTITHREAD_MIN_PARAMS
        and "OMP_NUM_THREADS" not in os.environ
    ):
        return 1
    return DEFAULT_THREADS


def set_thread_count(model: torch.nn.Module, device: torch.device) -> None:
    """Add ``model`` to the loaded models, and set torch's number of threads for the largest one.

    The number is global, so a small reward model must not reduce it for a large policy.
    """
    _in_use.add(model)
    size = max(sum(p.numel() for p in one.parameters()) for one in _in_use)
    torch.set_num_threads(choose_thread_count(size, device))


class MasterOptimizer(torch.optim.Optimizer):
    """An optimizer whose state and arithmetic are at least float32, for weights of any dtype.

    A bf16 weight has eight bits of precision, so an update can be lost if it is smaller than 1/256
    of the weight. Updates are therefore applied to float32 master weights, which are converted to
    the dtype of the weights after each step. Float32 and float64 weights need no separate master
    weights.

    Args:
        params: Parameters, or parameter groups.
        fused: Class of torch's optimizer, called with ``fused=True``, for the master weights.
        settings: Learning rate and other keyword arguments of ``fused``.
    """

    moments: tuple[str, ...] = ()
    """Names of the moments in the state of the fused optimizer."""

    def __init__(
        self, params: Iterable[Any], fused: type[torch.optim.Optimizer], settings: dict[str, Any]
    ) -> None:
        super().__init__(params, settings)
        self._settings = tuple(settings)
        self.master_weights = [
            [_master_weight(p) for p in group["params"]] for group in self.param_groups
        ]
        self._chunks = [
            _OptimizerChunk(group, fused([piece.master for piece in pieces], fused=True), pieces)  # type: ignore[call-arg]
            for group, masters in enumerate(self.master_weights)
            for pieces in _group_weight_pairs_into_chunks(
                zip(self.param_groups[group]["params"], masters, strict=True)
            )
        ]
        self._divisor: torch.Tensor | None = None

    @torch.no_grad()
    def clip_at_next_step(self, max_norm: float) -> float:
        """Measure the global norm of the gradients. The next step clips it to ``max_norm``.

        The optimizer step scales the gradients, so they are not read and written once more. If a
        gradient is sharded, every process must call this method.

        Returns:
            The norm before clipping.
        """
        weights = (p for group in self.param_groups for p in group["params"])
        norm = total_norm([p.grad for p in weights if p.grad is not None])
        self._divisor = None if norm <= max_norm else (norm / max_norm).float()
        return float(norm)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the weights from their gradients; ``closure`` is ignored."""
        for chunk in self._chunks:
            outer = self.param_groups[chunk.group]
            settings = {key: outer[key] for key in self._settings}
            chunk.inner.param_groups[0].update(settings)
            chunk.inner.grad_scale = self._divisor  # type: ignore[attr-defined]  # as GradScaler does
            separate = [piece for piece in chunk.pieces if piece.master is not piece.weight]
            for piece in separate:
                grad = piece.weight.grad
                rows = None if grad is None else local_part(grad)[piece.rows]
                piece.master.grad = None if rows is None else rows.to(piece.master.dtype)
            chunk.inner.step()
            for piece in separate:
                if piece.has_separate_master:
                    local_part(piece.weight)[piece.rows].copy_(piece.master)
                piece.master.grad = None
        self._divisor = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the fused optimizers, and copies of the separate master weights."""
        outer = super().state_dict()
        masters = [master.clone() for _, master in self._weights_with_separate_master()]
        inner = [chunk.inner.state_dict() for chunk in self._chunks]
        return {**outer, "inner": inner, "masters": masters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned, exactly.

        Weights with separate master weights are set to the values of these.
        """
        state = dict(state_dict)
        inner, masters = state.pop("inner"), state.pop("masters")
        super().load_state_dict(state)
        for chunk, saved in zip(self._chunks, inner, strict=True):
            chunk.inner.load_state_dict(saved)
        with torch.no_grad():
            for (weight, master), saved in zip(
                self._weights_with_separate_master(), masters, strict=True
            ):
                master.copy_(saved)
                weight.copy_(saved)

    def _weights_with_separate_master(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the pairs (weight, master weight) in which the master is another tensor object.

        It is a float32 copy, or the rows of a sharded weight that this process holds.
        """
        for group, masters in zip(self.param_groups, self.master_weights, strict=True):
            for weight, master in zip(group["params"], masters, strict=True):
                if master is not weight:
                    yield weight, master

    @torch.no_grad()
    def parameter_states(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Yield each parameter with the part of its state that is in this process.

        The state has a tensor for each of ``moments``, ``step`` if there are moments, and
        ``master`` if the master weight is a copy. The tensors are those of the optimizer, except
        for moments of a weight that is updated in several pieces, which are copies.
        """
        pieces = self._pieces_by_parameter()
        for group, masters in zip(self.param_groups, self.master_weights, strict=True):
            for parameter, master in zip(group["params"], masters, strict=True):
                state = {} if parameter.dtype == master.dtype else {"master": master}
                parts = [self._state_of(*piece) for piece in pieces[id(parameter)]]
                for name in self.moments:
                    values = [part[name] for part in parts]
                    state[name] = values[0] if len(values) == 1 else torch.cat(values)
                if self.moments:
                    state["step"] = parts[0]["step"]
                yield parameter, state

    @torch.no_grad()
    def load_parameter_states(
        self, states: Iterable[tuple[torch.Tensor, dict[str, torch.Tensor]]]
    ) -> None:
        """Copy states into the optimizer and the weights.

        Args:
            states: The pairs that `parameter_states` yielded, with new values in their tensors.
        """
        pieces = self._pieces_by_parameter()
        for parameter, state in states:
            if "master" in state:
                local_part(parameter).copy_(state["master"])
            for chunk, piece in pieces[id(parameter)]:
                piece_state = self._state_of(chunk, piece)
                for name in self.moments:
                    piece_state[name].copy_(state[name][piece.rows])
                if self.moments:
                    piece_state["step"].copy_(state["step"])

    def _pieces_by_parameter(self) -> dict[int, list[tuple[_OptimizerChunk, _WeightPiece]]]:
        """Return the pieces of each parameter, by its id, in row order and with their chunks."""
        pieces: dict[int, list[tuple[_OptimizerChunk, _WeightPiece]]] = {}
        for chunk in self._chunks:
            for piece in chunk.pieces:
                pieces.setdefault(id(piece.weight), []).append((chunk, piece))
        return pieces

    def _state_of(self, chunk: _OptimizerChunk, piece: _WeightPiece) -> dict[str, torch.Tensor]:
        """Return the state of a piece; before its first update, the state is created."""
        state = chunk.inner.state[piece.master]
        if not state and self.moments:
            state["step"] = torch.zeros((), dtype=torch.float32, device=piece.master.device)
            state |= {name: torch.zeros_like(piece.master) for name in self.moments}
        return state


class MasterAdamW(MasterOptimizer):
    """AdamW (Loshchilov & Hutter 2019) with float32 moments and master weights."""

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, torch.optim.AdamW, settings)


class MasterSGD(MasterOptimizer):
    """Stochastic gradient descent without momentum, with float32 master weights."""

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, torch.optim.SGD, {"lr": lr, "weight_decay": weight_decay})


def total_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the global norm of gradients, some of which may be sharded.

    If a gradient is sharded, every process must call this function.
    """
    sharded, whole = [], []
    for gradient in gradients:
        (sharded if isinstance(gradient, DTensor) else whole).append(local_part(gradient))
    norm = torch.nn.utils.get_total_norm(whole)
    if not sharded:
        return norm
    squared = torch.nn.utils.get_total_norm(sharded).square()
    torch.distributed.all_reduce(squared)
    return (squared + norm.square()).sqrt()


def _master_weight(parameter: torch.Tensor) -> torch.Tensor:
    """Return the tensor that the fused optimizer updates for a parameter.

    It is the parameter or, if the parameter is sharded, its rows in this process. For a dtype
    narrower than float32, it is a float32 copy of them.
    """
    rows = local_part(parameter)
    return rows if rows.dtype.itemsize >= 4 else rows.detach().float()


@dataclass(frozen=True)
class _WeightPiece:
    """Rows of a weight and the same rows of its master weight."""

    weight: torch.Tensor
    """The whole weight, which has the gradient. It may be sharded."""
    rows: Any
    """Index of the rows in this process: a slice, or ``...`` for all rows."""
    master: torch.Tensor
    """These rows of the master weight."""

    @property
    def has_separate_master(self) -> bool:
        """Whether the master weight has memory of its own, because its dtype is wider."""
        return self.master.dtype != self.weight.dtype


@dataclass(frozen=True)
class _OptimizerChunk:
    """Pieces of one parameter group that are updated together."""

    group: int
    """Index of the parameter group."""
    inner: torch.optim.Optimizer
    pieces: list[_WeightPiece]


def _group_weight_pairs_into_chunks(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[list[_WeightPiece]]:
    """Split pairs (weight, master weight) into pieces, and yield chunks of pieces.

    A chunk has at most ``OPTIMIZER_CHUNK_ELEMENTS`` elements, or consists of one larger piece.
    """
    chunk: list[_WeightPiece] = []
    size = 0
    for piece in (piece for pair in pairs for piece in _split_into_pieces(*pair)):
        if chunk and size + piece.master.numel() > OPTIMIZER_CHUNK_ELEMENTS:
            yield chunk
            chunk, size = [], 0
        chunk.append(piece)
        size += piece.master.numel()
    if chunk:
        yield chunk


def _split_into_pieces(weight: torch.Tensor, master: torch.Tensor) -> Iterator[_WeightPiece]:
    """Split a weight into pieces of rows with at most ``OPTIMIZER_CHUNK_ELEMENTS`` elements.

    A weight without a separate master weight is not split, and a piece has at least one row.
    """
    if master.dtype == weight.dtype or master.numel() <= OPTIMIZER_CHUNK_ELEMENTS:
        yield _WeightPiece(weight, ..., master)
        return
    height = max(1, OPTIMIZER_CHUNK_ELEMENTS // master[0].numel())
    for start in range(0, len(master), height):
        rows = slice(start, start + height)
        yield _WeightPiece(weight, rows, master[rows])
