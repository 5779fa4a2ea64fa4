"""Load and check a causal language model and its tokenizer."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from rlhf.common.files import atomic_path
from rlhf.config.model import ModelSpec
from rlhf.errors import UserError, first_line
from rlhf.models.adapters import CONFIG_FILE, HubModel, add_lora, is_adapter, load_merged_model
from rlhf.models.checks import check_padding_and_causality, read_causal_model
from rlhf.models.fast.packing import select_attention_without_packing
from rlhf.models.hub import check_model_files, commit_of, fetch_model_folder, hub_id_of
from rlhf.models.precision import choose_dtype, default_device, set_thread_count
from rlhf.models.scratch import make_random_llama_model, make_tokenizer
from rlhf.models.trainable import make_trainable
from rlhf.reward_models.chat_template import set_chat_options
from rlhf.runs.claim import check_output_path

log = logging.getLogger(__name__)

# Transformers shows progress bars even for files that are loaded within milliseconds.
hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()

# Pad tokens in order of preference: reserved tokens that rarely occur in encoded text.
_FALLBACK_PAD_TOKENS = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<|endoftext|>",
    "<unk>",
    "[UNK]",
)


def find_model_folder(spec: ModelSpec) -> str:
    """Return the folder of a configured model, after a check of its files; "" for a new model.

    Raises:
        UserError: The model is not available, or a file is damaged.
    """
    if spec.scratch:
        return ""
    folder = fetch_model_folder(str(spec.path), revision=spec.revision)
    check_model_files(folder)
    return folder


def load_model(
    spec: ModelSpec,
    *,
    seed: int,
    tokenizer_texts: Iterable[str] = (),
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer of a configuration.

    The trained parameters require gradients, and the model is in evaluation mode.

    Args:
        spec: Source, dtype and adapters of the model.
        seed: Random seed of new weights and adapters.
        tokenizer_texts: Training texts for the tokenizer of a model from scratch.
        device: Device of the model; by default, ``default_device()``.

    Returns:
        The model, in a PEFT wrapper if the configuration has LoRA adapters, and the tokenizer.

    Raises:
        UserError: The model is not available, ``check_padding_and_causality`` fails, or the model
            does not support the attention implementation or the adapters.
    """
    device = device or default_device()
    hub = None
    if spec.scratch:
        tokenizer = make_tokenizer(tokenizer_texts, spec.scratch.vocab_size)
        model: Any = make_random_llama_model(spec.scratch, tokenizer, seed=seed)
        dtype = choose_dtype(spec.dtype, model.num_parameters(), device)
    else:
        folder = find_model_folder(spec)
        name = None if is_adapter(folder) else hub_id_of(str(spec.path))
        hub = HubModel(name, commit_of(folder)) if name else None
        tokenizer = load_tokenizer(folder)
        # If their number is known, the weights are read in their final dtype without a second copy.
        size = count_stored_weights(folder)
        read_as = choose_dtype(spec.dtype, size, device) if size else torch.float32
        model = load_causal_model(folder, dtype=read_as)
        dtype = choose_dtype(spec.dtype, size or model.num_parameters(), device)
    set_chat_options(tokenizer, kwargs=spec.chat_template_kwargs, fold_system=spec.fold_system)
    if ensure_pad_token_and_embedding(tokenizer, model):
        hub = None  # the embedding has a new row
    move_and_cast(model, device, dtype)
    if spec.attn_implementation:
        select_attention_without_packing(model, spec.attn_implementation)
    set_thread_count(model, device)
    check_padding_and_causality(model, tokenizer)
    if spec.lora:
        model = add_lora(model, spec.lora, seed=seed, hub=hub)
    make_trainable(model)
    log_model(spec, model, dtype, device)
    return model, tokenizer


def log_model(spec: ModelSpec, model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Log the source, the size, the dtype and the device of a model."""
    millions = model.num_parameters() / 1e6
    log.info(
        "model %s: %.1fM parameters, %s on %s", spec.path or "from scratch", millions, dtype, device
    )


def count_stored_weights(folder: str) -> int:
    """Return the number of weights in a model folder, from the headers of its safetensors files.

    The result is 0 if the folder has no safetensors files. It is also 0 for an adapter folder,
    because the adapters are merged in float32.
    """
    if is_adapter(folder):
        return 0
    total = 0
    for path in Path(folder).glob("model*.safetensors"):
        with safe_open(path, "pt") as weights:
            shapes = (weights.get_slice(key).get_shape() for key in weights.keys())  # noqa: SIM118
            total += sum(math.prod(shape) for shape in shapes)
    return total


def move_and_cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model to a device and convert its weights to a dtype, in place."""
    model.to(device)
    cast_weights(model, dtype)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of a model to a dtype, in place.

    Non-persistent buffers, such as rotary frequencies, keep their dtype. Rounding of frequencies to
    bfloat16 would change the angles of distant positions by several radians.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            saved = name not in module._non_persistent_buffers_set
            if saved and buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))
    model.config.dtype = dtype  # type: ignore[union-attr]


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id.

    Raises:
        UserError: No tokenizer is found or can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        if Path(source).is_dir() and not any(Path(source).glob("tokenizer*")):
            raise UserError(
                f"{source} has no tokenizer: set model.path to a folder with config.json, the "
                "tokenizer and the weights, such as final/ of a run"
            ) from error
        raise UserError(
            f"the tokenizer of {source} cannot be loaded: {first_line(error)}"
        ) from error


def load_causal_model(folder: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a causal model in ``dtype``, or an adapter folder merged into its base in float32.

    Raises:
        UserError: The folder contains no causal language model, a file is damaged or in an
            unsupported format, or the adapters cannot be merged.
    """
    check_model_files(folder)
    try:
        if not is_adapter(folder):
            return read_causal_model(folder, dtype=dtype)
        model = load_merged_model(folder)
        if model.get_output_embeddings() is None:
            raise UserError(f"{folder} is an adapter of a classifier, not of a language model")
        return model
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{folder} is not a causal language model: {reason}") from error


def ensure_pad_token_and_embedding(tokenizer: Any, model: PreTrainedModel) -> bool:
    """Ensure that the pad token differs from EOS; return whether the embedding was enlarged.

    If the pad token were EOS, a mask from the token ids would hide the EOS at the end of a text,
    and a reward model could not distinguish finished from truncated replies. The pad token is
    chosen or added by ``ensure_pad_token``, and its id is set in the configuration of the model. If
    an added token has no embedding, the embedding is enlarged.
    """
    ensure_pad_token(tokenizer)
    grows = tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    if grows:
        with torch.random.fork_rng(devices=[]):  # the new row is random
            torch.default_generator.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer))
    set_pad_token_id(model, tokenizer)
    return grows


def set_pad_token_id(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the id of the padding token in the configuration of a model."""
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:  # None for classifiers
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give a tokenizer a pad token that differs from EOS and BOS, and return the token's id.

    The pooling of Transformers reads the last token that is not padding. If the pad token were EOS,
    this pooling would skip the EOS of a finished reply. The pad token is a reserved token of the
    vocabulary if there is one. Otherwise, ``<|pad|>`` is added, and the caller must resize the
    model's embedding to ``len(tokenizer)`` if it has no row for this token. In both cases, the
    caller must set ``model.config.pad_token_id`` to the returned id before training.
    """
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    if tokenizer.pad_token is None or tokenizer.pad_token in taken:
        known = tokenizer.get_vocab()
        spare = [token for token in _FALLBACK_PAD_TOKENS if token in known and token not in taken]
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else _FALLBACK_PAD_TOKENS[0]})
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id


def merge_adapter(adapter: str, target: Path) -> Path:
    """Merge the adapters of a LoRA folder into their base model, and save it in ``target``.

    The folder is written under a temporary name and then renamed, so it is always complete.

    Raises:
        UserError: The folder contains no adapter, its base model is not available, the adapters
            cannot be merged, or ``target`` exists or cannot be created.
    """
    check_output_path(target, option="target")
    if target.exists():
        raise UserError(f"{target} exists already; choose another folder")
    with atomic_path(target) as partial:
        save_merged_model(adapter, partial)
    return target


def save_merged_model(adapter: str, folder: Path) -> None:
    """Write the model of `merge_adapter` to a folder.

    Raises:
        UserError: The folder ``adapter`` contains no adapter, its base model is not available, or
            the adapters cannot be merged.
    """
    if not is_adapter(adapter):
        raise UserError(f"{adapter} contains no LoRA adapter (no {CONFIG_FILE})")
    model = load_merged_model(adapter)
    tokenizer = load_tokenizer(adapter)
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for extra in Path(adapter).glob("reward_model.json"):
        shutil.copy(extra, folder)
