"""Checks of a loaded model before it is trained or sampled from.

All weights of the model must be in the folder, and all weights in the folder must be used. All ids
of the tokenizer must have an embedding. The logits of a token must depend neither on padding nor on
later tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from rlhf.errors import UserError
from rlhf.models.architecture import unwrap_peft, usable_context_length
from rlhf.models.comparison import (
    evaluation_mode,
    forward_errors_as_user_errors,
    is_float32_or_wider,
    tolerance_of,
)
from rlhf.models.output_head import head_is_weight_product

# Maximum number of tokens in the rows that are compared, without the padding that is added.
CHECKED_ROW_TOKENS = 24


def read_causal_model(source: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal model of a folder or hub id, and check that its weights are complete.

    Transformers initializes missing weights randomly and ignores unknown weights. Without this
    check, a classifier or a decoder without an output head would become a random policy.

    Raises:
        UserError: The model is an encoder-decoder, or weights are missing, are unknown or have the
            wrong shape.
        OSError, ValueError: Transformers finds no causal model.
    """
    config = AutoConfig.from_pretrained(source)
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if config.is_encoder_decoder or type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{source} ({kind}) is an encoder-decoder model: a policy must be a decoder-only model"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
        model, info = loaded
    except RuntimeError as error:  # weights with the wrong shape
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source} ({kind}) cannot be loaded as a causal model: {reason}"
        ) from error
    for key, problem in (
        ("missing_keys", "are missing, so they would be initialized randomly"),
        ("unexpected_keys", "are not part of the model, so they would not be used"),
    ):
        if names := sorted(info[key]):
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise UserError(
                f"{source} ({kind}) is not a {type(model).__name__}: weights {listed} {problem}"
            )
    return model


def check_padding_and_causality(model: Any, tokenizer: Any) -> None:
    """Check that a model's logits depend neither on padding nor on later tokens.

    Args:
        model: Causal model.
        tokenizer: Tokenizer of the model, with a pad token.

    Raises:
        UserError: The tokenizer has ids without an embedding, the model cannot be run, its logits
            cannot be computed from its last hidden states, or the logits of a token depend on
            padding or on later tokens.
    """
    check_ids_have_embeddings(model, tokenizer)
    check_logits_ignore_padding_and_future(model, pad_id=tokenizer.pad_token_id)


def check_logits_ignore_padding_and_future(model: Any, *, pad_id: int) -> None:
    """Check that a model's logits depend neither on padding nor on later tokens.

    Args:
        model: Causal model.
        pad_id: Id of the padding token.

    Raises:
        UserError: The model cannot be run, its logits cannot be computed from its last hidden
            states, or the logits of a token depend on padding or on later tokens.
    """
    head_is_weight_product(model)
    config = unwrap_peft(model).config.get_text_config()
    length = min(CHECKED_ROW_TOKENS, usable_context_length(config) - 3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        min(5, config.vocab_size - 1), config.vocab_size, (1, length), generator=generator
    )
    ids = ids.to(model.device)
    padded = nn.functional.pad(ids, (0, 3), value=pad_id)
    mask = nn.functional.pad(torch.ones_like(ids), (0, 3))
    cut = max(1, 2 * length // 3)
    name = type(unwrap_peft(model)).__name__
    with (
        torch.no_grad(),
        evaluation_mode(model),
        forward_errors_as_user_errors(f"{name} cannot be run as a causal model"),
    ):
        full = model(input_ids=ids, use_cache=False).logits
        with_padding = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
        truncated = model(input_ids=ids[:, :cut], use_cache=False).logits
    for gap, problem in (
        (
            max_or_mean_relative_difference(with_padding[:, :length], full),
            "padding changes the logits",
        ),
        (
            max_or_mean_relative_difference(truncated, full[:, :cut]),
            "tokens change the logits of earlier tokens",
        ),
    ):
        if not gap <= tolerance_of(model):
            raise UserError(
                f"{name} is not supported: {problem} by a relative difference of {gap:.1e}"
            )


def check_scores_ignore_padding_but_not_last_token(model: Any) -> None:
    """Check that the scores of a reward model depend on the last token but not on padding.

    Args:
        model: Sequence classifier with a pad token and a new head.

    Raises:
        UserError: The model cannot be run, its scores depend on padding, or its scores do not
            depend on the last token (for example because a decoder's head reads the first token).
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    size, pad = config.vocab_size, model.config.pad_token_id
    length = min(CHECKED_ROW_TOKENS, usable_context_length(config))
    ids = torch.randint(size - 1, (3, length), generator=generator)
    ids = torch.where(ids >= pad, ids + 1, ids).to(model.device)  # any token except padding
    ids[1, length // 2 :] = pad
    ids[2] = ids[0]
    ids[2, -1] = ids[0, 0]
    rows = [ids[:1], ids[1:2, : length // 2], ids[2:]]
    name = type(model).__name__
    with (
        torch.no_grad(),
        evaluation_mode(model),
        forward_errors_as_user_errors(f"{name} cannot score texts"),
    ):
        together = model(input_ids=ids, attention_mask=(ids != pad).long()).logits
        alone = torch.cat([model(input_ids=row).logits for row in rows])
    difference = float((together - alone).abs().max())
    if not difference <= tolerance_of(model) * max(1.0, float(alone.abs().max())):
        raise UserError(f"{name} is not supported: padding changes its scores by {difference:.1e}")
    if torch.equal(alone[0], alone[2]):
        raise UserError(f"{name} is not supported: its score does not depend on the last token")


def check_ids_have_embeddings(model: Any, tokenizer: Any) -> None:
    """Check that all ids of a tokenizer, except its unknown token, have an embedding.

    Raises:
        UserError: A token has no embedding.
    """
    rows = unwrap_peft(model).get_input_embeddings().num_embeddings
    # Some tokenizer classes add an unknown token. Byte-level tokenizers never produce this token.
    beyond = {
        i: token
        for token, i in tokenizer.get_vocab().items()
        if i >= rows and token != tokenizer.unk_token
    }
    if beyond:
        first = min(beyond)
        raise UserError(
            f"{len(beyond)} tokens of the tokenizer have no embedding in the model (the first is "
            f"{beyond[first]!r} with id {first}; the embedding has {rows} rows): use the model's "
            "own tokenizer, or resize the embedding and save the model first"
        )


def max_or_mean_relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the difference of two tensors relative to the magnitude of ``expected``.

    In float32 and float64, the result is the largest absolute difference divided by the largest
    absolute element of ``expected``, or by 1 if this element is less than 1. In half precision, the
    result is the mean absolute difference divided by the mean absolute element.
    """
    difference, size = (actual.double() - expected.double()).abs(), expected.double().abs()
    if is_float32_or_wider(expected):
        return float(difference.max() / size.max().clamp(min=1.0))
    return float(difference.mean() / size.mean().clamp(min=1e-6))
