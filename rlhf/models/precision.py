"""bf16 weights with float32 masters, where the machine multiplies bf16 natively."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Fewest parameters from which bf16 products save more than the conversions cost.
BF16_MIN_PARAMS = 1_000_000

# Fewest parameters from which products are long enough to share between threads.
MULTITHREAD_MIN_PARAMS = 10_000_000

# Elements per step of the optimizer, so that float32 gradients exist for one chunk at a time.
OPTIMIZER_CHUNK_ELEMENTS = 2**20

# As torch found the machine, before any model asked for fewer.
DEFAULT_THREADS = torch.get_num_threads()

# Models that were loaded and are still held by somebody.
_in_use: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def default_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run on units made for them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and sys.platform.startswith("linux"):
        flags = Path("/proc/cpuinfo").read_text().split()
        return "amx_bf16" in flags or "avx512_bf16" in flags
    return False


def choose_dtype(name: str, num_parameters: int, device: torch.device) -> torch.dtype:
    """The dtype that ``model.dtype`` asks for.

    Args:
        name: "auto", "float32", "bfloat16" or "float16".
        num_parameters: "auto" leaves models under a million parameters in float32.
        device: where the model will run.
    """
    if name == "auto":
        fast = native_bf16(device) and num_parameters >= BF16_MIN_PARAMS
        return torch.bfloat16 if fast else torch.float32
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return named[name]


def choose_threads(num_parameters: int, device: torch.device) -> int:
    """Threads that torch should use: one for a small model on a CPU, else as many as it would.

    A small model's products take microseconds; handing them to a second thread costs more than it
    saves, and many times more on a machine that is busy with something else. ``OMP_NUM_THREADS``
    in the environment overrules this.
    """
    if (
        device.type == "cpu"
        and num_parameters < MULTITHREAD_MIN_PARAMS
        and "OMP_NUM_THREADS" not in os.environ
    ):
        return 1
    return DEFAULT_THREADS


def use_threads(model: torch.nn.Module, device: torch.device) -> None:
    """Give torch the threads that the largest of the models in use deserves.

    The number is global: a small reward model loaded beside a large policy must not leave it one.
    """
    _in_use.add(model)
    size = max(sum(p.numel() for p in one.parameters()) for one in _in_use)
    torch.set_num_threads(choose_threads(size, device))


class MasterOptimizer(torch.optim.Optimizer):
    """An optimizer whose state and arithmetic are at least float32, whatever the weights' dtype.

    A bf16 weight has eight bits of mantissa: an update smaller than 1/256 of the weight is lost.
    The float32 masters keep it; after each step the weights are the masters rounded. Float32 and
    float64 weights are their own masters. It is an ordinary optimizer to schedulers, trainers and
    checkpoints.

    Args:
        params: Parameters, or parameter groups.
        fused: Fused optimizer of torch that updates the masters.
        settings: Learning rate and the other keyword arguments of ``fused``.
    """

    def __init__(
        self, params: Iterable[Any], fused: type[torch.optim.Optimizer], settings: dict[str, Any]
    ) -> None:
        super().__init__(params, settings)
        self._settings = tuple(settings)
        self.masters = [
            [p if p.dtype.itemsize >= 4 else p.detach().float() for p in group["params"]]
            for group in self.param_groups
        ]
        self._parts = [
            _Part(place, fused([piece.master for piece in pieces], fused=True), pieces)  # type: ignore[call-arg]
            for place, masters in enumerate(self.masters)
            for pieces in _portions(zip(self.param_groups[place]["params"], masters, strict=True))
        ]
        self._divisor: torch.Tensor | None = None

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> float:
        """Let the next step scale the gradients down to a global norm.

        They are divided on their way into the step, which spares a trip over all of them.

        Returns:
            The norm before.
        """
        weights = (p for group in self.param_groups for p in group["params"])
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        self._divisor = None if norm <= max_norm else (norm / max_norm).float()
        return float(norm)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients of the weights."""
        for part in self._parts:
            outer = self.param_groups[part.place]
            settings = {key: outer[key] for key in self._settings}
            part.inner.param_groups[0].update(settings)
            part.inner.grad_scale = self._divisor  # type: ignore[attr-defined]  # as GradScaler does
            wide = [piece for piece in part.pieces if piece.master is not piece.weight]
            for piece in wide:
                grad = piece.weight.grad
                piece.master.grad = None if grad is None else grad[piece.rows].float()
            part.inner.step()
            for piece in wide:
                piece.weight[piece.rows].copy_(piece.master)
                piece.master.grad = None
        self._divisor = None

    def state_dict(self) -> dict[str, Any]:
        """State of the fused optimizers, and the masters that differ from the weights."""
        outer = super().state_dict()
        masters = [master.clone() for _, master in self._wide()]
        inner = [part.inner.state_dict() for part in self._parts]
        return {**outer, "inner": inner, "masters": masters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, to the bit."""
        state = dict(state_dict)
        inner, masters = state.pop("inner"), state.pop("masters")
        super().load_state_dict(state)
        for part, saved in zip(self._parts, inner, strict=True):
            part.inner.load_state_dict(saved)
        with torch.no_grad():
            for (weight, master), saved in zip(self._wide(), masters, strict=True):
                master.copy_(saved)
                weight.copy_(saved)

    def _wide(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(weight, master) where they are two tensors."""
        for group, masters in zip(self.param_groups, self.masters, strict=True):
            for weight, master in zip(group["params"], masters, strict=True):
                if master is not weight:
                    yield weight, master


class MasterAdamW(MasterOptimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with float32 masters and moments."""

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
    """Stochastic gradient descent without momentum, with float32 masters.

    It keeps no state besides the masters.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, torch.optim.SGD, {"lr": lr, "weight_decay": weight_decay})


@dataclass(frozen=True)
class _Piece:
    """Rows of a weight, and their master: a view into that of the whole weight.

    A weight that is its own master is one piece.
    """

    weight: torch.Tensor
    rows: Any
    master: torch.Tensor


@dataclass(frozen=True)
class _Part:
    """Pieces of one parameter group that are updated together."""

    place: int
    """Of the parameter group."""
    inner: torch.optim.Optimizer
    pieces: list[_Piece]


def _portions(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[list[_Piece]]:
    """Pieces of weights and masters in order, ``OPTIMIZER_CHUNK_ELEMENTS`` numbers at a time."""
    portion: list[_Piece] = []
    size = 0
    for piece in (piece for pair in pairs for piece in _cut(*pair)):
        if portion and size + piece.master.numel() > OPTIMIZER_CHUNK_ELEMENTS:
            yield portion
            portion, size = [], 0
        portion.append(piece)
        size += piece.master.numel()
    if portion:
        yield portion


def _cut(weight: torch.Tensor, master: torch.Tensor) -> Iterator[_Piece]:
    """Rows of at most ``OPTIMIZER_CHUNK_ELEMENTS`` of a weight with a separate master."""
    if master is weight or weight.numel() <= OPTIMIZER_CHUNK_ELEMENTS:
        yield _Piece(weight, ..., master)
        return
    height = max(1, OPTIMIZER_CHUNK_ELEMENTS // weight[0].numel())
    for start in range(0, len(weight), height):
        rows = slice(start, start + height)
        yield _Piece(weight, rows, master[rows])
