"""What a loaded causal model must hold before anything is trained on it.

The weights are all there and all used, the tokenizer's ids have rows in the embedding, and the
logits of a token depend neither on padding nor on the tokens after it. Each failure is one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from rlhf.errors import UserError
from rlhf.models.architecture import unwrap_peft, usable_context
from rlhf.models.output_head import has_plain_head

# Tokens of the row that is read: enough for an attention to look back, few enough to cost nothing.
LENGTH = 24
# Largest difference of logits, relative to the largest, in float32 and in half precision (mean).
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1


def read_causal(place: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """The causal model of a folder or hub id, refused where its weights are not all it needs.

    Transformers fills missing weights with random numbers and leaves unknown ones unused: a
    classifier, or a decoder without its output head, would become a policy that speaks noise.

    Args:
        place: folder or hub id.
        dtype: to read the weights in.

    Raises:
        UserError: an encoder-decoder; weights that are missing, unused or of another shape.
        OSError, ValueError: as transformers raises them, where there is no causal model.
    """
    config = AutoConfig.from_pretrained(place)
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if config.is_encoder_decoder or type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{place} ({kind}) is of an encoder-decoder family: a policy is a decoder alone, which "
            "reads its prompt and continues it"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, output_loading_info=True
        )
        model, info = loaded
    except RuntimeError as error:  # weights of another shape
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place} ({kind}) cannot be loaded as a causal model: {reason}") from error
    for what, then in (
        ("missing_keys", "and would be random"),
        ("unexpected_keys", "and would not be used"),
    ):
        if found := sorted(info[what]):
            named = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
            state = "are missing" if what == "missing_keys" else "have no place in the model"
            raise UserError(
                f"{place} ({kind}) is not a {type(model).__name__}: weights {named} {state} {then}"
            )
    return model


def check_model(model: Any, tokenizer: Any) -> None:
    """Read one row of tokens whole, padded and cut, and compare what comes of its tokens.

    Args:
        model: as loaded.
        tokenizer: its tokenizer, with a pad token.

    Raises:
        UserError: the tokenizer has ids that the model lacks; its output head cannot be used for
            some tokens alone; the logits of a token change with
            padding, or with the tokens after it.
    """
    _check_ids(model, tokenizer)
    has_plain_head(model)
    config = unwrap_peft(model).config.get_text_config()
    length = min(LENGTH, usable_context(config) - 3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        min(5, config.vocab_size - 1), config.vocab_size, (1, length), generator=generator
    )
    ids = ids.to(model.device)
    padded = nn.functional.pad(ids, (0, 3), value=tokenizer.pad_token_id)
    mask = nn.functional.pad(torch.ones_like(ids), (0, 3))
    cut = max(1, 2 * length // 3)
    with torch.no_grad(), evaluating(model):
        try:
            whole = model(input_ids=ids, use_cache=False).logits
            in_company = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
            beginning = model(input_ids=ids[:, :cut], use_cache=False).logits
        except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{type(unwrap_peft(model)).__name__} cannot be run as a causal model: {reason}"
            ) from error
    for gap, what in (
        (gap_of(in_company[:, :length], whole), "padding changes the logits"),
        (gap_of(beginning, whole[:, :cut]), "tokens change the logits of those before them"),
    ):
        tolerance = TOLERANCE if is_precise(model) else HALF_TOLERANCE
        if not gap <= tolerance:
            raise UserError(
                f"{type(unwrap_peft(model)).__name__} is not supported: {what} by {gap:.1e} of "
                "their size"
            )


def check_scorer(model: Any) -> None:
    """Score two ragged texts together and alone, and one of them with another end.

    Args:
        model: a sequence classifier with a pad token, on a fresh head.

    Raises:
        UserError: it cannot be run; scores change with padding, or do not depend on the end of the
            text, as those of a decoder do whose head reads the first token.
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    size, pad = config.vocab_size, model.config.pad_token_id
    length = min(LENGTH, usable_context(config))
    ids = torch.randint(size - 1, (3, length), generator=generator)
    ids = torch.where(ids >= pad, ids + 1, ids).to(model.device)  # any token but padding
    ids[1, length // 2 :] = pad
    ids[2] = ids[0]
    ids[2, -1] = ids[0, 0]
    rows = [ids[:1], ids[1:2, : length // 2], ids[2:]]
    with torch.no_grad(), evaluating(model):
        try:
            together = model(input_ids=ids, attention_mask=(ids != pad).long()).logits
            alone = torch.cat([model(input_ids=row).logits for row in rows])
        except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{type(model).__name__} cannot score texts: {reason}") from error
    difference = float((together - alone).abs().max())
    spread = float((alone[0] - alone[2]).abs().max())
    tolerance = TOLERANCE if is_precise(model) else HALF_TOLERANCE
    if not difference <= tolerance * max(1.0, float(alone.abs().max())):
        raise UserError(
            f"{type(model).__name__} is not supported: padding changes its scores by "
            f"{difference:.1e}"
        )
    if spread == 0:
        raise UserError(
            f"{type(model).__name__} is not supported: its score does not depend on the last token"
        )


def _check_ids(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids go beyond the embedding.

    Raises:
        UserError: names the first such token.
    """
    rows = unwrap_peft(model).get_input_embeddings().num_embeddings
    # Some tokenizer classes add an unknown token of their own, which byte-level text never needs.
    beyond = {
        i: token
        for token, i in tokenizer.get_vocab().items()
        if i >= rows and token != tokenizer.unk_token
    }
    if beyond:
        first = min(beyond)
        raise UserError(
            f"the tokenizer has {len(beyond)} tokens that the model has no embedding for (first "
            f"{beyond[first]!r}, id {first}; the embedding has {rows} rows): it belongs to another "
            "model, or the embedding must be resized and saved first"
        )


def is_precise(model: Any) -> bool:
    """Whether a model computes in float32 or better, so that rounding hides nothing."""
    return model.dtype in (torch.float32, torch.float64)


def gap_of(found: Tensor, expected: Tensor) -> float:
    """Difference of two tensors relative to their size: the largest, or in half precision the mean.

    Rounding in half precision can send single tokens to another expert.
    """
    difference, size = (found.double() - expected.double()).abs(), expected.double().abs()
    if expected.dtype in (torch.float32, torch.float64):
        return float(difference.max() / size.max().clamp(min=1.0))
    return float(difference.mean() / size.mean().clamp(min=1e-6))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it lasts, dropout is off; every module is left in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
