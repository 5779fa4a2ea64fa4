"""The memory of a training run, computed from the sizes of its tensors.

A training run has phases, such as sampling and updates. The tensors of the training state exist in
all of them, and every phase needs more tensors for a while. The memory of a run is that of the
phase that needs most. A `Memory` contains bytes on one device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from rlhf.models.fast.chunked_logprobs import HEAD_CHUNK_LOGITS
from rlhf.models.precision import OPTIMIZER_CHUNK_ELEMENTS

KERNEL_BYTES, MAX_CACHED_KERNELS = 3 * 2**18, 1024
"""Mean size of a kernel of oneDNN (measured), and the default size of oneDNN's cache of kernels."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a phase, by part."""

    weights: float = 0
    """Weights of the model that is trained."""
    gradients: float = 0
    """Gradients of the trained weights, including those of the critic."""
    optimizer: float = 0
    """Moments and float32 master weights, including those of the critic."""
    reference: float = 0
    """Weights of the frozen reference model."""
    critic: float = 0
    """Weights of the critic: its value head, and its decoder if it has a separate one."""
    rewards: float = 0
    """Weights of learned rewards."""
    copies: float = 0
    """Copies of the trained weights for asynchronous rollouts."""
    activations: float = 0
    """Tensors that a forward pass saves for the backward pass."""
    kv_cache: float = 0
    """Keys and values of the sampler, and its copies of weights."""
    logits: float = 0
    """Logits and the tensors of the same size that are computed from them."""
    temporary: float = 0
    """Other tensors that exist for the duration of some operations."""
    kernels: float = 0
    """Matrix kernels that oneDNN compiles and keeps."""
    files: float = 0
    """Pages of a file of weights that is mapped into memory."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class TrainingState:
    """Bytes of the tensors that exist during the whole run, if one process holds all of them."""

    weights: int
    gradients: int
    optimizer: int
    reference: int = 0
    critic: int = 0
    rewards: int = 0
    policy_copy: int = 0
    """Bytes of the copy of the trained weights with which asynchronous rollouts are sampled. During
    the run, there are two snapshots of the same size in addition."""
    master_weights: int = 0
    """Bytes of the float32 master weights, a part of ``optimizer``. They are copied for a
    checkpoint."""
    embeddings: int = 0
    """Bytes of the weights outside the transformer blocks."""
    largest_block: int = 0
    """Bytes of the weights of the largest transformer block."""
    itemsize: int = 4
    """Bytes of a weight, in the widest dtype of the weights."""

    def memory_per_device(self, shards: int, *, with_gradients: bool) -> Memory:
        """Return the memory that the training state needs on one device.

        Args:
            shards: Number of processes over which weights, gradients and optimizer state are
                sharded (FSDP2). With more than one, the weights outside the blocks and those of two
                blocks, of which one is prefetched, are whole while a pass uses them. A reference
                model is sharded in the same way, and learned rewards are not sharded.
            with_gradients: Whether the gradients of all trained weights exist.
        """
        gathered = self.embeddings + 2 * self.largest_block if shards > 1 else 0
        return Memory(
            weights=self.weights / shards,
            gradients=self.gradients / shards if with_gradients else 0,
            optimizer=self.optimizer / shards,
            reference=self.reference / shards,
            critic=self.critic / shards,
            rewards=self.rewards,
            copies=3 * self.policy_copy,
            temporary=gathered,
        )

    def unsharded_gradient_bytes(self) -> float:
        """Return the bytes of gradients that are whole in a backward pass with shards.

        These are the gradients of one block and of the weights outside the blocks, in the dtype of
        the weights, and in a float32 buffer that is summed over the processes.
        """
        copies = 1 + max(4, self.itemsize) / self.itemsize
        return copies * min(self.gradients, self.embeddings + self.largest_block)


@dataclass(frozen=True)
class PassSize:
    """Bytes that the passes of a decoder over one micro-batch need, without the output head."""

    saved: float
    """Tensors that the forward pass saves for the backward pass."""
    backward: float
    """Largest number of bytes that the backward pass allocates in addition, without gradients of
    weights."""
    forward: float
    """Largest number of bytes of a forward pass without gradients."""


@dataclass(frozen=True)
class HeadSize:
    """Sizes of the output head and of the logits of one micro-batch.

    The logits are computed in chunks, see `rlhf.models.fast.chunked_logprobs`.
    """

    vocabulary: int
    width: int
    tokens: int
    """Number of tokens with logits."""
    itemsize: int
    """Bytes of a weight."""
    trained: bool
    """Whether the weight of the head is trained."""

    @property
    def chunk_tokens(self) -> int:
        """Number of tokens whose logits are computed at a time."""
        return min(self.tokens, max(1, HEAD_CHUNK_LOGITS // self.vocabulary))

    @property
    def chunk_logit_bytes(self) -> int:
        """Bytes of the logits of one chunk."""
        return self.chunk_tokens * self.vocabulary * self.itemsize

    @property
    def weight_gradient_bytes(self) -> int:
        """Bytes of the gradient of the head's weight, if it is trained."""
        return self.vocabulary * self.width * self.itemsize if self.trained else 0

    @property
    def backward_logit_bytes(self) -> int:
        """Largest number of bytes of logits and their gradients in the backward pass.

        The gradient of the weight is not included.
        """
        return 2 * self.chunk_logit_bytes


def parameter_bytes(parameters: Iterable[Tensor]) -> int:
    """Return the bytes of parameters; a parameter that occurs several times counts once."""
    unique = {id(p): p for p in parameters}
    return sum(p.numel() * p.element_size() for p in unique.values())


def master_weight_bytes(parameters: Iterable[Tensor]) -> int:
    """Return the bytes of the separate float32 master weights of an optimizer."""
    return sum(4 * p.numel() for p in parameters if p.element_size() < 4)


def optimizer_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """Return the bytes of an optimizer's state after its first step.

    Args:
        name: Name of the optimizer. "sgd" has no moment. Every other one is assumed to have two
            moments for each weight, as AdamW has; for one of a plug-in, this is an estimate.
        parameters: The trained weights. Moments have the dtype of the weights, at least float32.
    """
    parameters = list(parameters)
    moments = 0 if name == "sgd" else 2
    wide = sum(max(4, p.element_size()) * p.numel() for p in parameters)
    return moments * wide + master_weight_bytes(parameters)


def training_state(
    model: nn.Module,
    *,
    optimizer: str,
    blocks: Iterable[nn.Module],
    value_head: nn.Module | None = None,
    critic: nn.Module | None = None,
    reference: nn.Module | None = None,
    rewards: Iterable[nn.Module] = (),
    copied: bool = False,
) -> TrainingState:
    """Return the sizes of the training state.

    Args:
        model: The model to train, with its adapters. Parameters that do not require gradients are
            frozen.
        optimizer: Name of the optimizer.
        blocks: Transformer blocks of the model.
        value_head: Value head of the critic.
        critic: Decoder of a separate critic.
        reference: Frozen copy of the model.
        rewards: Models of learned rewards.
        copied: Whether a copy of the trained weights samples asynchronous rollouts.
    """
    critics = [module for module in (value_head, critic) if module is not None]
    trained = [p for module in (model, *critics) for p in module.parameters() if p.requires_grad]
    sizes = [parameter_bytes(block.parameters()) for block in blocks]
    weights = parameter_bytes(model.parameters())
    trained_weights = parameter_bytes(p for p in model.parameters() if p.requires_grad)
    return TrainingState(
        weights=weights,
        gradients=parameter_bytes(trained),
        optimizer=optimizer_bytes(optimizer, trained),
        reference=parameter_bytes(reference.parameters()) if reference is not None else 0,
        critic=parameter_bytes(p for module in critics for p in module.parameters()),
        rewards=parameter_bytes(p for module in rewards for p in module.parameters()),
        policy_copy=trained_weights if copied else 0,
        master_weights=master_weight_bytes(trained),
        embeddings=weights - sum(sizes),
        largest_block=max(sizes, default=0),
        itemsize=max(p.element_size() for p in model.parameters()),
    )


def update_memory(
    state: TrainingState,
    passes: PassSize,
    head: HeadSize | None,
    *,
    shards: int = 1,
    decoders: int = 1,
    micro_batches: int = 1,
) -> Memory:
    """Return the memory of an update: forward, backward and optimizer step.

    Gradients are allocated while activations are freed, but an allocator hardly reuses memory
    within a pass, because the sizes of the tensors differ. Both are therefore counted. With shards,
    freed memory returns to the system (`rlhf.runs.launch.configure_malloc_to_return_memory`). The
    peak is then at the start of the backward pass, with all activations, or at its end, with all
    gradients.

    Args:
        state: The training state.
        passes: Sizes of the passes of one decoder over the largest micro-batch.
        head: Sizes of the logits of this micro-batch; None for a reward model.
        shards: See `TrainingState.memory_per_device`.
        decoders: Number of decoders in the graph: 2 with a separate critic.
        micro_batches: Number of micro-batches per optimizer step. With several, the new gradient of
            the output head exists in addition to the sum of the earlier ones.
    """
    working = passes.backward
    if head is not None and micro_batches > 1:
        working = max(working, head.weight_gradient_bytes)
    saved, logits = decoders * passes.saved, 0 if head is None else head.backward_logit_bytes
    step = 4 * OPTIMIZER_CHUNK_ELEMENTS if state.master_weights else 0
    if shards == 1:
        return _with_added_bytes(
            state.memory_per_device(1, with_gradients=True),
            activations=saved,
            logits=logits,
            temporary=max(working, step),
        )
    start = _with_added_bytes(
        state.memory_per_device(shards, with_gradients=micro_batches > 1),
        activations=saved,
        logits=logits,
        temporary=working,
    )
    end = _with_added_bytes(
        state.memory_per_device(shards, with_gradients=True),
        temporary=max(state.unsharded_gradient_bytes() + working, step),
    )
    return max(start, end, key=lambda memory: memory.total)


def scoring_memory(
    state: TrainingState, passes: PassSize, head: HeadSize | None, *, shards: int = 1
) -> Memory:
    """Return the memory of a forward pass without gradients, after the first optimizer step."""
    before = state.memory_per_device(shards, with_gradients=False)
    logits = 0 if head is None else head.chunk_logit_bytes
    return _with_added_bytes(before, logits=logits, temporary=passes.forward)


def sampling_memory(
    state: TrainingState,
    *,
    kv_cache: float,
    logits: float,
    temporary: float = 0,
    shards: int = 1,
) -> Memory:
    """Return the memory of sampling: KV cache with copied weights, and logits of all rows.

    With shards, each process gathers all weights to sample.
    """
    before = state.memory_per_device(shards, with_gradients=False)
    before = dataclasses.replace(before, temporary=state.weights - before.weights)
    return _with_added_bytes(before, kv_cache=kv_cache, logits=logits, temporary=temporary)


def checkpoint_memory(state: TrainingState, *, shards: int = 1) -> Memory:
    """Return the memory of writing a checkpoint, for which the master weights are copied."""
    before = state.memory_per_device(shards, with_gradients=False)
    return _with_added_bytes(before, temporary=state.master_weights / shards)


def best_model_restore_memory(update: Memory, state: TrainingState, *, shards: int = 1) -> Memory:
    """Return the memory while the best model is restored from a file after the last update.

    The allocator keeps the memory of the update, and the file of the weights is mapped in addition.
    With shards, the allocator returns the memory, and a process maps only its rows of the file.
    """
    before = update if shards == 1 else state.memory_per_device(shards, with_gradients=False)
    return dataclasses.replace(before, files=before.files + state.gradients / shards)


def onednn_kernel_bytes(num_weight_shapes: int, num_token_counts: int) -> int:
    """Return the bytes of the kernels that oneDNN compiles for bf16 matrix products on a CPU.

    Args:
        num_weight_shapes: Number of different shapes of weights. Each has three products: in the
            forward pass, and for the gradients of the inputs and of the weights.
        num_token_counts: Number of different numbers of tokens of the passes.
    """
    return KERNEL_BYTES * min(MAX_CACHED_KERNELS, 3 * num_weight_shapes * num_token_counts)


def kv_cache_bytes(
    *, rows: int, tokens: int, layers: int, key_heads: int, head_width: int, itemsize: int
) -> int:
    """Return the bytes of the keys and values of ``rows`` rows with room for ``tokens`` tokens."""
    return 2 * rows * tokens * layers * key_heads * head_width * itemsize


def peak_phase(phases: Mapping[str, Memory]) -> str:
    """Return the name of the phase that needs most memory."""
    return max(phases, key=lambda name: phases[name].total)


def _with_added_bytes(memory: Memory, **added: float) -> Memory:
    """Return ``memory`` with bytes added to some parts."""
    return dataclasses.replace(
        memory, **{part: getattr(memory, part) + size for part, size in added.items()}
    )
