"""Encode plain text for language modeling. There is neither a prompt nor a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode_text_and_loss_mask(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """Encode a text, and mark the tokens to train on.

    Returns:
        Token ids [T] and the loss mask [T]. The ids begin with BOS if the tokenizer adds it, and
        end with EOS if the tokenizer has it. The mask is True for all tokens except the first.
    """
    return _with_eos_and_loss_mask(tokenizer, tokenizer(text)["input_ids"])


def encode_texts_and_loss_masks(
    tokenizer: Any, texts: Sequence[str]
) -> list[tuple[list[int], list[bool]]]:
    """Encode texts like `encode_text_and_loss_mask`, in one call of a tokenizer in Rust."""
    if not texts or not getattr(tokenizer, "is_fast", False):
        return [encode_text_and_loss_mask(tokenizer, text) for text in texts]
    return [_with_eos_and_loss_mask(tokenizer, ids) for ids in tokenizer(list(texts))["input_ids"]]


def _with_eos_and_loss_mask(tokenizer: Any, ids: Sequence[int]) -> tuple[list[int], list[bool]]:
    ids, eos = list(ids), tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return ids, [position > 0 for position in range(len(ids))]
