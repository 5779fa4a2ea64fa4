"""Load reward checkpoints, and reject those whose scores would be silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from rlhf.errors import UserError
from rlhf.reward_models import chat_template
from rlhf.reward_models.generic_heads import classifier_class
from rlhf.reward_models.sidecar import FILE_NAME, Sidecar

# Missing weights are reported in one line, without transformers' progress bars and tables.
hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()

_NO_LIMIT = 1_000_000  # a tokenizer without a limit has a larger model_max_length


def load_checkpoint(
    path: str | Path,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    per_token: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the reward model and the tokenizer at ``path``; the heads compute in float32.

    Args:
        path: Folder or Hugging Face Hub id.
        dtype: Data type of the weights outside the heads.
        device: Device of the model; by default the GPU if there is one.
        per_token: Whether the head classifies every token instead of the whole text.

    Raises:
        FileNotFoundError: There is no valid checkpoint.
        UserError: The checkpoint is an unmerged LoRA adapter, or weights are missing.
    """
    if (Path(path) / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is a LoRA adapter without its base model; merge it first: "
            f"rlhf models merge {path} {path}-merged"
        )
    load = call_loader(classifier_class, path, per_token=per_token).from_pretrained
    model = load_model(
        load, path, dtype=dtype, device=device, missing_weights_message="has no trained reward head"
    )
    cast_heads_to_fp32(model)
    return model, call_loader(AutoTokenizer.from_pretrained, path)


def load_model(
    load: Callable[..., Any],
    path: str | Path,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    missing_weights_message: str,
) -> Any:
    """Load a model in evaluation mode.

    Args:
        load: Function of Transformers that loads a model, such as ``from_pretrained``.
        path: Folder or Hugging Face Hub id.
        dtype: Type of the weights.
        device: Device of the model; by default the GPU if there is one.
        missing_weights_message: End of the error message about a checkpoint with missing weights,
            such as "has no trained reward head"; the message begins with the path.

    Raises:
        FileNotFoundError: There is no valid checkpoint.
        UserError: Weights are missing, which Transformers would initialize randomly.
    """
    model, info = call_loader(load, path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{path} {missing_weights_message} (missing weights: {names})")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def call_loader(load: Callable[..., Any], path: str | Path, **options: Any) -> Any:
    """Call a loading function of Transformers with ``path`` and return its result.

    Raises:
        FileNotFoundError: There is no checkpoint, ``path`` is the folder of a run instead of its
            folder ``final``, or the loader raised OSError or ValueError.
    """
    missing = (
        f"no model at {path}: there is no such folder with a valid checkpoint, and no such "
        "model could be loaded from the Hugging Face Hub"
    )
    if (Path(path) / "final").is_dir() and not (Path(path) / "config.json").exists():
        raise FileNotFoundError(
            f"no model at {path}: the model of this run is {Path(path) / 'final'}"
        )
    if not Path(path).exists() and "/" not in str(path):
        # Hub ids without an owner are not looked up: without a network, a request takes a minute.
        raise FileNotFoundError(missing)
    try:
        return load(path, **options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(missing) from error


def cast_heads_to_fp32(model: PreTrainedModel) -> None:
    """Make all modules outside the base model compute in float32, in place.

    bfloat16 has 8 bits of precision. If rewards have a mean of 20 and a standard deviation of 1,
    rounding to bfloat16 reduces the pairwise accuracy by two percentage points.
    """
    for child in model.children():
        if child is not model.base_model:
            child.float()
            child.register_forward_pre_hook(_cast_inputs_to_fp32)


def _cast_inputs_to_fp32(module: torch.nn.Module, inputs: tuple) -> tuple:
    return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def keep_first_output(model: PreTrainedModel, *, label: str) -> None:
    """Remove all outputs of the reward head except the first one, in place.

    The last linear layer of the head keeps one row of its weights. The remaining output gets the
    label ``label`` in the configuration of the model.
    """
    layer = output_layer(model)
    assert layer is not None
    layer.weight = torch.nn.Parameter(layer.weight.detach()[:1].clone())
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(layer.bias.detach()[:1].clone())
    layer.out_features = 1
    model.config.num_labels = 1
    model.config.id2label, model.config.label2id = {0: label}, {label: 0}


def output_layer(model: PreTrainedModel) -> torch.nn.Linear | None:
    """Return the last linear layer of the head, whose outputs are the logits; None without one."""
    layers = [
        layer
        for child in model.children()
        if child is not model.base_model
        for layer in child.modules()
        if isinstance(layer, torch.nn.Linear) and layer.out_features == model.config.num_labels
    ]
    return layers[-1] if layers else None


def pooling_of(model: PreTrainedModel) -> str:
    """Return the pooling of a model, as in `Sidecar`.

    The pooling is ``last`` for decoders, and ``model`` for other models. A model is a decoder if
    its child module ``score`` is a linear layer.
    """
    is_decoder = isinstance(dict(model.named_children()).get("score"), torch.nn.Linear)
    return "last" if is_decoder else "model"


def find_sidecar(path: str | Path) -> Sidecar | None:
    """Return the sidecar of a checkpoint folder or Hugging Face Hub id, or None.

    Raises:
        FileNotFoundError: There is no such folder or model, or the Hugging Face Hub is not
            available.
    """
    if Path(path).is_dir():
        return Sidecar.read(path)
    file = call_loader(
        cached_file, str(path), filename=FILE_NAME, _raise_exceptions_for_missing_entries=False
    )
    return Sidecar.read(Path(file).parent) if file else None


def checked_or_inferred_sidecar(
    path: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    append_eos: bool | None,
) -> Sidecar:
    """Check and return the sidecar of a checkpoint; if there is no sidecar, infer one.

    Args:
        path: Folder or Hugging Face Hub id.
        model: The loaded model.
        tokenizer: The loaded tokenizer.
        max_length: Requested maximum number of tokens; None if there is no request.
        append_eos: Whether texts should end with EOS; None if there is no request.

    Raises:
        FileNotFoundError: The Hugging Face Hub is not available; see `find_sidecar`.
        UserError: The sidecar contradicts the model, the tokenizer or a requested setting, or it
            cannot be inferred.
    """
    sidecar = find_sidecar(path)
    if sidecar is None:
        sidecar = _infer_sidecar(
            path, model, tokenizer, max_length=max_length, append_eos=append_eos
        )
    check_sidecar(
        path,
        sidecar,
        template_hash=chat_template.template_hash(tokenizer),
        pooling=pooling_of(model),
        append_eos=append_eos,
        max_length=max_length,
    )
    positions = _max_positions(model)
    if sidecar.max_length is not None and positions is not None and sidecar.max_length > positions:
        raise UserError(
            f"{path}: max_length={sidecar.max_length} exceeds the model's {positions} positions"
        )
    return sidecar


def check_sidecar(path: str | Path, sidecar: Sidecar, **settings: Any) -> None:
    """Compare a sidecar with the requested values of its fields; None is not compared.

    Raises:
        UserError: A value differs.
    """
    for key, value in settings.items():
        if value is not None and getattr(sidecar, key) != value:
            raise UserError(
                f"{path} was trained with {key}={getattr(sidecar, key)!r}, "
                f"but here it is {value!r}; the scores would not be comparable"
            )


def _infer_sidecar(
    path: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    append_eos: bool | None,
) -> Sidecar:
    """Infer the sidecar of a checkpoint that has none, such as one that TRL trained.

    If ``append_eos`` is None, EOS is appended only if the model is a decoder whose tokenizer has an
    EOS token and no chat template.

    Raises:
        UserError: ``append_eos`` cannot be inferred.
    """
    checkpoints = Path(path).parent
    is_of_run = checkpoints.name == "checkpoints" and (checkpoints.parent / "config.yaml").is_file()
    if append_eos is None and is_of_run:
        raise UserError(
            f"{path} is a checkpoint without reward_model.json, so the encoding of its texts is "
            f"unknown: use the final model, {checkpoints.parent / 'final'}"
        )
    pooling = pooling_of(model)
    if append_eos is None:
        if pooling == "last" and model.config.pad_token_id == tokenizer.eos_token_id is not None:
            raise UserError(
                f"{path} has no reward_model.json, and its pad token is its EOS token, so its head "
                "was not trained at EOS; set append_eos to true or false"
            )
        is_plain = tokenizer.chat_template is None and tokenizer.eos_token is not None
        append_eos = pooling == "last" and is_plain
    return Sidecar(
        template_hash=chat_template.template_hash(tokenizer),
        append_eos=append_eos,
        max_length=max_length or max_input_tokens(model, tokenizer),
        pooling=pooling,
    )


def max_input_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the number of tokens that a model can read; None if it is unknown.

    It is the smaller of the tokenizer's limit and the model's number of positions.
    """
    limits = [n for n in (tokenizer.model_max_length, _max_positions(model)) if n and n < _NO_LIMIT]
    return min(limits, default=None)


def _max_positions(model: PreTrainedModel) -> int | None:
    """Return the maximum number of positions of the model, or None if it is unknown."""
    return model.config.to_dict().get("max_position_embeddings")
