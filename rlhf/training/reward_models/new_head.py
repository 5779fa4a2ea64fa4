"""Load a language model or an encoder with a new, untrained reward head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from rlhf.errors import UserError
from rlhf.models.adapters import add_lora, is_adapter, load_merged_model
from rlhf.models.checks import check_scores_ignore_padding_but_not_last_token, read_causal_model
from rlhf.models.fast.packing import select_attention_without_packing
from rlhf.models.hub import check_model_files, fetch_model_folder
from rlhf.models.loading import ensure_pad_token_and_embedding, load_tokenizer, move_and_cast
from rlhf.models.precision import choose_dtype, default_device, set_thread_count
from rlhf.models.trainable import make_trainable
from rlhf.reward_models.chat_template import set_chat_options
from rlhf.reward_models.checkpoint import cast_heads_to_fp32, pooling_of
from rlhf.reward_models.generic_heads import classifier_with_new_head, transformers_has_classifier
from rlhf.training.reward_models.base import RewardKind


def load_model_tokenizer_and_pooling(kind: RewardKind) -> tuple[Any, Any, str]:
    """Load the model of a run with a new reward head and a padding token other than EOS.

    Args:
        kind: Kind of reward model, with the configuration of the run.

    Returns:
        The model on the default device and in the configured dtype, its tokenizer, and its pooling
        (see `rlhf.reward_models.sidecar.Sidecar`).

    Raises:
        UserError: ``model.scratch`` is set, the model does not exist, a reward head cannot be added
            to it, or it has fewer positions than max_length.
    """
    config = kind.config
    if config.model.scratch:
        raise UserError(
            "model.scratch: a reward model must start from a trained model; set model.path"
        )
    folder = fetch_model_folder(str(config.model.path), revision=config.model.revision)
    check_model_files(folder)
    tokenizer = load_tokenizer(folder)
    set_chat_options(
        tokenizer,
        kwargs=config.model.chat_template_kwargs,
        fold_system=config.model.fold_system,
    )
    model = load_backbone_with_head(folder, kind.output_names(), per_token=kind.per_token)
    model.config.problem_type = kind.problem_type
    model.config.use_cache = False
    positions = model.config.to_dict().get("max_position_embeddings")
    if positions is not None and config.max_length > positions:
        raise UserError(
            f"max_length must be <= {positions} for this model, got {config.max_length}"
        )
    ensure_pad_token_and_embedding(tokenizer, model)
    if config.num_heads > 1:
        reinitialize_heads(model)
    device = default_device()
    size = model.num_parameters()
    move_and_cast(model, device, choose_dtype(config.model.dtype, size, device))
    if config.model.attn_implementation:
        select_attention_without_packing(model, config.model.attn_implementation)
    set_thread_count(model, device)
    cast_heads_to_fp32(model)
    if not kind.per_token:
        check_scores_ignore_padding_but_not_last_token(model)
    pooling = "steps" if kind.per_token else pooling_of(model)
    if config.model.lora:
        model = add_adapters(model, kind)
    return make_trainable(model), tokenizer, pooling


def load_backbone_with_head(folder: str, output_names: list[str], *, per_token: bool) -> Any:
    """Load the backbone of a model folder with a new head, in float32. Adapters are merged.

    Args:
        folder: Folder of a language model or an encoder, or of an adapter.
        output_names: Names of the outputs.
        per_token: Whether the model has outputs for every token, instead of only for the whole
            text.

    Raises:
        UserError: The model does not exist, or a reward head cannot be added to it.
    """
    labels = {
        "num_labels": len(output_names),
        "id2label": dict(enumerate(output_names)),
        "label2id": {name: i for i, name in enumerate(output_names)},
    }
    check_model_files(folder)
    options = {"dtype": torch.float32, "output_loading_info": True}
    automatic: Any = (
        AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    )
    try:
        merged = load_merged_model(folder) if is_adapter(folder) else None
        config = merged.config if merged else AutoConfig.from_pretrained(folder)
        if not transformers_has_classifier(config, per_token=per_token):
            causal = merged or read_causal_model(folder, dtype=torch.float32)
            return classifier_with_new_head(causal, labels, per_token=per_token)
        if merged is None:
            model, info = automatic.from_pretrained(folder, **options, **labels)
        else:
            for key, value in labels.items():
                setattr(config, key, value)
            with torch.device("meta"):
                kind = type(automatic.from_config(config))
            model, info = kind.from_pretrained(
                None, config=config, state_dict=merged.state_dict(), **options
            )
    except UserError:
        raise
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"a reward head cannot be added to {folder}: {reason}") from error
    _check_backbone_loaded(folder, model, info["missing_keys"])
    return model


def _check_backbone_loaded(folder: str, model: Any, missing: Iterable[str]) -> None:
    """Check that all weights of the backbone were loaded. Missing weights would be random.

    Raises:
        UserError: Weights are missing. The message lists up to three of them.
    """
    prefix = f"{model.base_model_prefix}."
    # A pooler counts as a part of the head, because language models are saved without a pooler.
    lost = sorted(name for name in missing if name.startswith(prefix) and ".pooler." not in name)
    if lost:
        raise UserError(
            f"a reward head cannot be added to {folder}: weights {', '.join(lost[:3])} of the "
            "backbone are missing, so they would be initialized randomly"
        )


def head_modules(model: Any) -> dict[str, Any]:
    """Return name -> module for the modules outside the backbone."""
    return {name: m for name, m in model.named_children() if m is not model.base_model}


def reinitialize_heads(model: Any) -> None:
    """Initialize the linear layers of the heads with standard deviation 1 / sqrt(width).

    The heads of an ensemble should disagree on texts that differ from the training data, so their
    initial weights must differ. The smaller initialization of language models would make the heads
    almost equal.
    """
    for module in head_modules(model).values():
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)


def add_adapters(model: Any, kind: RewardKind) -> Any:
    """Return a PEFT model with adapters on the backbone, and with the whole new head trained."""
    assert kind.config.model.lora is not None
    # Without modules_to_save, PEFT would freeze the head, which would stay random.
    head_names = [
        name for name, m in head_modules(model).items() if any(True for _ in m.parameters())
    ]
    task = "TOKEN_CLS" if kind.per_token else "SEQ_CLS"
    return add_lora(
        model, kind.config.model.lora, seed=kind.config.seed, task=task, head_names=head_names
    )
