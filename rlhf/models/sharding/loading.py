"""Load models whose weights will be sharded, without their weights if possible.

The checks of `rlhf.models.loading` need a model with weights. For a model without weights, they run
on a small model of the same architecture, with random weights.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from rlhf.config.model import ModelSpec
from rlhf.errors import UserError
from rlhf.models.adapters import HubModel, add_lora, is_adapter
from rlhf.models.checks import check_ids_have_embeddings, check_logits_ignore_padding_and_future
from rlhf.models.fast.packing import select_attention_without_packing
from rlhf.models.fast.verification import enable_fast_paths_of_small_model
from rlhf.models.hub import commit_of, hub_id_of
from rlhf.models.loading import (
    cast_weights,
    ensure_pad_token,
    find_model_folder,
    load_model,
    load_tokenizer,
    log_model,
    set_pad_token_id,
)
from rlhf.models.precision import choose_dtype, default_device, set_thread_count
from rlhf.models.reduced_model import small_random_model_like
from rlhf.models.scratch import make_random_llama_model, make_tokenizer
from rlhf.models.sharding.deferred import (
    DeferredWeights,
    make_model_with_deferred_values,
    move_buffers,
)
from rlhf.models.sharding.tensors import StoredWeights
from rlhf.models.trainable import make_trainable
from rlhf.reward_models.chat_template import set_chat_options

log = logging.getLogger(__name__)


def load_model_to_shard(
    spec: ModelSpec, *, seed: int, tokenizer_texts: Iterable[str] = ()
) -> tuple[Any, Any]:
    """Load the model and the tokenizer of a configuration like `load_model`, for sharding.

    Every process must call this function. The weights of the model are not loaded; each process
    loads its rows when the model is sharded. In some cases, each process loads the whole model;
    the log gives the reason.

    Raises:
        UserError: See `load_model`. Or the checks cannot be made, because no small model of the
            architecture can be made.
    """
    device = default_device()
    hub = None
    if spec.scratch:
        tokenizer = make_tokenizer(tokenizer_texts, spec.scratch.vocab_size)
        make_model = functools.partial(make_random_llama_model, spec.scratch, tokenizer, seed=seed)
        model = make_model_with_deferred_values(make_model, device)
    else:
        folder = find_model_folder(spec)
        tokenizer = load_tokenizer(folder)
        ensure_pad_token(tokenizer)
        model, reason = _make_model_for_stored_rows(spec, folder, tokenizer, device)
        if model is None:
            log.info("each process loads the whole model before it is sharded, because %s", reason)
            return load_model(spec, seed=seed)
        name = hub_id_of(str(spec.path))
        hub = HubModel(name, commit_of(folder)) if name else None
    set_chat_options(tokenizer, kwargs=spec.chat_template_kwargs, fold_system=spec.fold_system)
    set_pad_token_id(model, tokenizer)
    dtype = choose_dtype(spec.dtype, model.num_parameters(), device)
    cast_weights(model, dtype)
    move_buffers(model, device)
    if spec.attn_implementation:
        select_attention_without_packing(model, spec.attn_implementation)
    set_thread_count(model, device)
    check_ids_have_embeddings(model, tokenizer)
    small = _make_and_check_small_model(model, device)
    if spec.lora:
        add_lora(small, spec.lora, seed=seed)  # checks the adapters
        with _placeholder_weights(model, device):
            model = add_lora(model, spec.lora, seed=seed, hub=hub, check_effect=False)
    make_trainable(model)
    log_model(spec, model, dtype, device)
    return model, tokenizer


def _make_model_for_stored_rows(
    spec: ModelSpec, folder: str, tokenizer: Any, device: torch.device
) -> tuple[Any, str]:
    """Make a causal model without weights, whose weights will be read by rows from a folder.

    Returns:
        The model, or None and the reason why the weights cannot be read by rows. In this case,
        `load_model` loads the folder or raises an error.
    """
    if is_adapter(folder):
        return None, "its adapters must be merged"
    if spec.lora and spec.lora.use_dora:
        return None, "DoRA computes the magnitudes of whole weights"
    if spec.lora and spec.lora.modules_to_save:
        return None, "model.lora.modules_to_save copies whole modules"
    stored = StoredWeights(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(config)
        model.tie_weights()  # within the context, a tied weight became two parameters
    except (KeyError, OSError, ValueError):
        return None, f"{folder} is not an ordinary folder of a causal model"
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        return None, "the embedding gets a new row for the padding token"
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - shapes.keys()
    if shapes != {name: shape for name, shape in stored.shapes.items() if name not in tied}:
        return None, f"its files and {type(model).__name__} have different names or shapes"
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.deferred_weights = DeferredWeights(stored, device)
    return model, ""


def _make_and_check_small_model(model: Any, device: torch.device) -> Any:
    """Run the checks at load time on a small model of the same architecture; return this model.

    The fast paths that agree on the small model are enabled in ``model``.

    Raises:
        UserError: A check fails, or no small model can be made.
    """
    small = small_random_model_like(model, device=device)
    if small is None:
        raise UserError(
            f"sharding: the checks of {type(model).__name__} cannot be made without its weights, "
            "because no small model of this architecture can be made; remove sharding"
        )
    check_logits_ignore_padding_and_future(
        small, pad_id=small.config.get_text_config().pad_token_id or 0
    )
    enable_fast_paths_of_small_model(model, small)
    return small


@contextlib.contextmanager
def _placeholder_weights(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Return a context manager in which weights on the meta device are zeros on ``device``.

    PEFT creates an adapter on the device of the weight, so that an adapter on the meta device would
    have no weights. All elements of a placeholder share the memory of one element.
    """
    owners = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    placeholders: dict[int, nn.Parameter] = {}
    for module, name, parameter in owners:
        if id(parameter) not in placeholders:
            zero = torch.zeros((), dtype=parameter.dtype, device=device)
            placeholders[id(parameter)] = nn.Parameter(zero.expand(parameter.shape))
        setattr(module, name, placeholders[id(parameter)])
    yield
    for module, name, parameter in owners:
        setattr(module, name, parameter)
